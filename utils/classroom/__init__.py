"""The classroom: assignments handed out and graded, the work of ``course.py assignments``.

``handout`` writes the students' copies. ``grading`` grades a folder of notebooks: ``submissions`` finds and reads
them, ``running`` runs each in a ``kernel`` of its own in a ``sandbox``, with a ``guard`` inside it, and adds
``remarks``; ``gradebook`` and ``pages`` write what comes out. ``assignments`` knows what a source notebook says.
"""

from importlib import import_module

_HOMES = {"release": "handout", "grade": "grading", "feedback": "pages"}


def __getattr__(name: str):
    """``release``, ``grade`` and ``feedback``, loaded when they are called for: nbgrader takes a second."""
    if name not in _HOMES:
        raise AttributeError(f"utils.classroom has no {name!r}; it has {', '.join(_HOMES)}.")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
