"""How Sphinx sets the site. ``utils/book/site.py`` runs it; ``BOOK_SOURCE`` says where the staged pages lie."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(os.environ["BOOK_SOURCE"])
SITE = json.loads((SOURCE / "_site.json").read_text(encoding="utf-8"))
sys.path.insert(0, str(ROOT))
log = logging.getLogger(__name__)

project, version, release = SITE["title"], SITE["version"], SITE["version"]
author = "The Bytes to Chat maintainers"
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_*"]
templates_path = ["templates"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_text_lexer = "none"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_dmath_allow_space = False
myst_dmath_allow_digits = False
highlight_language = "none"
smartquotes_action = "q"
copybutton_selector = "div.highlight:not(.cell_output *):not(.printed *) pre"
copybutton_exclude = ".linenos, .gp"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = SITE["title"]
html_baseurl = SITE["address"]
html_static_path = [str(Path(__file__).parent / "static"), str(SOURCE / "_made")]
html_css_files = ["book.css"]
html_js_files = [("book.js", {"defer": "defer"})]
html_favicon = "static/icon.svg"
html_math_renderer = "mathml"
html_domain_indices = False
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_last_updated_fmt = None
html_permalinks_icon = "#"
html_theme_options = {
    "repository_url": SITE["repository"], "repository_branch": SITE["branch"],
    "use_download_button": False, "use_fullscreen_button": False, "show_toc_level": 2, "max_navbar_depth": 1,
    "search_bar_text": "Search the book", "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark", "toc_title": "On this page",
    "logo": {"text": SITE["title"]}, "footer_content_items": ["made.html"],
    "icon_links": [{"name": "The repository on GitHub", "url": SITE["repository"], "icon": "fa-brands fa-github"}],
}
html_context = {"default_mode": "auto", "book": SITE}


# ---------------------------------------------------------------- formulas: TeX to MathML, which browsers draw


def formulas(app, doctree):
    """Put the MathML of every formula of a page on its node, with one call of pandoc."""
    found = list(doctree.findall(lambda node: isinstance(node, (nodes.math, nodes.math_block))))
    if not found:
        return
    import pypandoc
    text = "\n\n".join(f"$${_plain(node)}$$" if isinstance(node, nodes.math_block) else f"${_plain(node)}$"
                       for node in found)
    done = subprocess.run([pypandoc.get_pandoc_path(), "--from=markdown", "--to=html", "--mathml"], input=text,
                          capture_output=True, text=True, encoding="utf-8", check=True)
    spaced = re.sub(r'(<mo>&#8289;</mo></mrow>)(?!<mo[^>]*"prefix")', r'\1<mspace width="0.17em"/>', done.stdout)
    made = re.findall(r"<math\b.*?</math>", spaced, re.S)  # a thin space in "log V", none in "log(V)"
    if len(made) != len(found):
        log.warning("%d of %d formulas could not be turned into MathML: %s", len(found) - len(made), len(found),
                    done.stderr)
    for node, text in zip(found, made, strict=False):
        node["mathml"] = text


def _plain(node):
    return " ".join(node.astext().split())


def inline_math(translator, node):
    translator.body.append(f'<span class="math">{node.get("mathml", "")}</span>')
    raise nodes.SkipNode


def block_math(translator, node):
    translator.body.append(f'<div class="math scrolls">{node.get("mathml", "")}</div>')
    raise nodes.SkipNode


# ---------------------------------------------------------------- the index of terms, figures, launch buttons


class IndexMark(SphinxRole):
    """A place in the index of terms, not seen in the text."""

    def run(self):
        label = f"index-{self.env.new_serialno('index')}"
        entry = addnodes.index(entries=[("single", self.text, label, "", None)])
        target = nodes.target("", "", ids=[label])
        self.inliner.document.note_explicit_target(target)
        return [entry, target], []


def mark_terms(app, doctree):
    """Lead the index to the bold words themselves: the search shows what stands where an entry leads."""
    for mark in list(doctree.findall(nodes.target)):
        after = mark.parent.children[mark.parent.index(mark) + 1:]
        term = next((node for node in after if node.astext()), None)
        if "".join(mark["ids"]).startswith("index-") and isinstance(term, (nodes.strong, nodes.emphasis)):
            term["ids"] += mark["ids"]
            mark.parent.remove(mark)


def finish(app, pagename, templatename, context, doctree):
    """Put the figures into the finished page, and the ways to run it."""
    launch = SITE["launch"].get(pagename)
    if pagename == "index":
        context["title"], context["docstitle"] = "Bytes to Chat: a language model from scratch", ""
    if body := context.get("body"):
        body = re.sub(r"<!--figure ([\w-]+)-->", lambda found: _svg(found[1]), body)
        context["body"] = body.replace("<!--launch-->", _launch_line(pagename) if launch else "")
    if launch:
        context["header_buttons"].append({
            "type": "group", "tooltip": "Run this page", "icon": "fas fa-rocket", "label": "launch-buttons",
            "buttons": [{"type": "link", "text": name, "tooltip": f"Open this notebook in {name}", "url": url}
                        for name, url in launch.items()]})


def _svg(label):
    return (SOURCE / "_figures" / f"{label}.svg").read_text(encoding="utf-8")


def _launch_line(pagename):
    links = "".join(f' <a href="{url.replace("&", "&amp;")}">{name}</a>'
                    for name, url in SITE["launch"][pagename].items())
    source = f'{SITE["repository"]}/blob/{SITE["branch"]}/{SITE["notebooks"][pagename]}'
    return f'<p class="launch"><span>Run it in</span>{links} <a href="{source}">notebook on GitHub</a></p>'


def sitemap(app, error):
    """A list of all pages for search engines, beside them."""
    if error is None and app.builder.name == "html":
        lines = [f"<url><loc>{SITE['address']}{name}.html</loc></url>" for name in sorted(app.env.found_docs)]
        text = "\n".join(['<?xml version="1.0" encoding="UTF-8"?>',
                          '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">', *lines, "</urlset>", ""])
        Path(app.outdir, "sitemap.xml").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- docstrings, which are plain text


def docstring(app, what, name, obj, options, lines):
    """Plain text with ``x`` marks as reST, and the way back to the section that defines it."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip())
    if what == "module" or paragraphs[0].startswith("Alias for field number"):
        paragraphs = []
    lines[:] = [line for paragraph in paragraphs for line in [*_paragraph(paragraph.splitlines()), ""]]
    if name in SITE["sections"]:
        label, title = SITE["sections"][name]
        lines += [f"Built in :ref:`{_escaped(title)} <{label}>`.", ""]


def _paragraph(lines):
    """A paragraph as reST: text, or, where its lines stand in, a block that keeps them as they are."""
    inner = [line for line in lines if line.strip()]
    if any(line.startswith(" ") for line in inner):
        return ["::", "", *(f"   {line}" for line in inner)]
    return [_escaped(line) for line in inner]


def _escaped(line):
    parts = re.split(r"(``.+?``)", line)
    return "".join(part if number % 2 else re.sub(r"([\\*`|_])", r"\\\1", part)
                   for number, part in enumerate(parts))


def setup(app):
    app.connect("doctree-read", formulas)
    app.connect("doctree-read", mark_terms)
    app.connect("html-page-context", finish, priority=900)
    app.connect("build-finished", sitemap)
    app.connect("autodoc-process-docstring", docstring)
    app.add_role("idx", IndexMark())
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
