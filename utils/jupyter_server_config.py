"""JupyterLab as `course.py lab` starts it: on this machine only, with a token, exporting on save."""

import warnings
from pathlib import Path

from utils.export import ExportError, chapter_notebooks, export_notebook
from utils.workspace import ROOT, short_path


def export_on_save(model, os_path, contents_manager, **_):
    """After a chapter's notebook is saved, rewrite its module, so that the next chapter uses it."""
    path = Path(os_path).resolve()
    if model["type"] != "notebook" or path not in chapter_notebooks(ROOT):
        return
    try:
        if export_notebook(path):
            contents_manager.log.info("%s written from %s", short_path(path.with_suffix(".py")), path.name)
    except ExportError as error:  # the save itself went well: keep the module of before and say so
        contents_manager.log.warning("%s was left as it was: %s", short_path(path.with_suffix(".py")), error)


def without_news(handler, page_config):
    """JupyterLab without the question whether it may fetch news: it asks nobody outside for anything."""
    page_config.setdefault("disabledExtensions", []).append("@jupyterlab/apputils-extension:announcements")
    return page_config


warnings.filterwarnings("ignore", message="Overriding existing post_save_hook")  # Jupyter reads this file twice
c = get_config()  # noqa: F821 - Jupyter defines it
c.FileContentsManager.post_save_hook = export_on_save
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.allow_remote_access = False
c.ServerApp.tornado_settings = {"page_config_hook": without_news}
c.LabApp.extra_labextensions_path = [str(Path(__file__).parent / "labextensions")]  # alternative text of figures
