"""The book: a web site, a PDF and an EPUB made from the executed notebooks, the work of ``course.py book``.

``text`` reads notebooks and the pages of ``docs/`` as ``blocks`` (a heading, a paragraph, a figure, an exercise);
``links`` turns "section 3.5" or "Vaswani et al. 2017" into links, ``citations`` collects the bibliography from the
notebooks' reading lists, ``figures`` takes the vector form out of an output. ``site``, ``pdf`` and ``epub``
write what they are given, and ``making`` runs them. Nothing is executed, and nothing is said twice: what a page
shows stands in its notebook.
"""

from .blocks import Book, Page, Part
from .making import BookError, Made, make_book
from .text import read_book

__all__ = ["Book", "BookError", "Made", "Page", "Part", "make_book", "read_book"]
