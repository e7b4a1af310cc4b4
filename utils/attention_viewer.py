"""A viewer for attention: type a sentence, choose a layer and a head, point at a token.

Python computes tokens and weights at each change of the text and sends all heads at once, a byte for
each weight; the rest happens in the browser. Where no kernel runs, a few heads stand as a picture.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence

import anywidget
import numpy as np
import traitlets
from matplotlib.figure import Figure

from .plots import draw_heatmap, figure
from .widgets import show_widget, themed

MAX_CHARACTERS, MAX_TOKENS = 400, 48

Reader = Callable[[str], tuple[Sequence[str], np.ndarray]]


def view_attention(read: Reader, text: str, heads: Mapping[str, tuple[int, int]], *, alt: str) -> None:
    """Show where every head of a model looks in a text that the reader may change.

    ``read(text)`` returns the tokens as they shall be shown and the weights (L, H, T, T): layers, heads,
    looking position, position looked at; of more than 48 tokens the first 48, with weights of these or
    of all. ``heads`` names a few
    (layer, head) worth visiting: the viewer opens at the first, and where no kernel runs all of them
    stand as a picture, with ``alt``. ``ValueError`` for a head that the model does not have.
    """
    viewer = AttentionViewer(read, text, heads)
    show_widget(viewer, draw_heads(*_checked(*read(text)), heads), alt)


def draw_heads(tokens: Sequence[str], weights: np.ndarray, heads: Mapping[str, tuple[int, int]]) -> Figure:
    """Attention maps of a few named heads side by side: rows look, columns are looked at."""
    columns = 2 if len(heads) in (2, 4) else min(len(heads), 3)
    rows = -(-len(heads) // columns)
    fig, axes = figure(ncols=columns, nrows=rows, width=8.6, height=0.6 + rows * 7.2 / columns, squeeze=False)
    for axis in axes.flat[len(heads):]:
        axis.set_axis_off()
    for number, (name, (layer, head)) in enumerate(heads.items()):
        axis = axes.flat[number]
        image = draw_heatmap(axis, weights[layer, head], title=f"{name}\nlayer {layer}, head {head}", vmin=0, vmax=1,
                             xticks=tokens, yticks=tokens if number % columns == 0 else [""] * len(tokens))
        axis.tick_params(axis="x", labelrotation=90)
        axis.tick_params(labelsize=8, length=0)
        axis.set(xlabel="is looked at", ylabel="looks" if number % columns == 0 else "")
    fig.colorbar(image, ax=axes, label="attention weight", shrink=0.7)
    return fig


class AttentionViewer(anywidget.AnyWidget):
    """The widget: ``text``, ``layer`` and ``head`` come from the browser, ``reading`` goes to it."""

    text = traitlets.Unicode().tag(sync=True)
    reading = traitlets.Dict().tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    head = traitlets.Int().tag(sync=True)
    marks = traitlets.List().tag(sync=True)
    limit = traitlets.Int(MAX_CHARACTERS).tag(sync=True)

    def __init__(self, read: Reader, text: str, heads: Mapping[str, tuple[int, int]]):
        if not heads:
            raise ValueError("heads is empty. Name at least one (layer, head): the viewer opens there.")
        first = _packed(*read(text))
        n_layers, n_heads = first["n_layers"], first["n_heads"]
        for name, (layer, head) in heads.items():
            if not (0 <= layer < n_layers and 0 <= head < n_heads):
                raise ValueError(f"{name!r} is layer {layer}, head {head}; layers go from 0 to {n_layers - 1}, "
                                 f"heads from 0 to {n_heads - 1}.")
        self._read = read
        (layer, head), *_ = heads.values()
        super().__init__(text=text, layer=layer, head=head, reading={"text": text, **first},
                         marks=[{"name": name, "layer": at[0], "head": at[1]} for name, at in heads.items()])
        self.observe(self._update, "text")

    def _update(self, change) -> None:
        try:
            self.reading = {"text": self.text, **_packed(*self._read(self.text[:MAX_CHARACTERS]))}
        except Exception as error:  # a message beats a widget that stands still
            self.reading = {"text": self.text, "message": f"{type(error).__name__}: {error}", "tokens": []}

    _esm = """
    const make = (tag, properties = {}, ...children) => {
      const node = Object.assign(document.createElement(tag), properties);
      node.append(...children);
      return node;
    };
    const percent = (x) => (x > 0 && x < 0.005 ? "<1%" : Math.round(100 * x) + "%");
    const shade = (weight) => {   // white to blue by the root, so that small weights show; black stays readable on it
      const x = 0.85 * Math.sqrt(weight);
      return [255 * (1 - x), 255 - 141 * x, 255 - 77 * x];
    };

    function render({ model, el }) {
      let tokens = [], weights = [], n_layers = 0, n_heads = 0, chosen = 0, backwards = false;
      const at = (layer, head, looks, seen) =>
        weights[((layer * n_heads + head) * tokens.length + looks) * tokens.length + seen] / 255;
      const here = (looks, seen) => at(model.get("layer"), model.get("head"), looks, seen);
      const weight = (other) => (backwards ? here(other, chosen) : here(chosen, other));
      const possible = (other) => (backwards ? other >= chosen : other <= chosen);

      const text = make("textarea", { rows: 2, maxLength: model.get("limit"), spellcheck: false });
      const layer = make("select"), head = make("select"), direction = make("select");
      direction.append(new Option("looks at", "at"), new Option("is looked at by", "by"));
      const marks = make("div", { className: "attention-bar" });
      const strip = make("div", { className: "attention-tokens", role: "toolbar", ariaLabel: "Tokens: choose one" });
      const said = make("p", { role: "status" }), note = make("p", { role: "status" });
      const overview = make("canvas", { className: "attention-overview", role: "img" });
      const map = make("canvas", { className: "attention-map", role: "img" });
      el.dataset.lmSuppressShortcuts = "true";   // keys pressed here are not commands to the notebook
      for (const event of ["keydown", "keypress", "keyup"]) el.addEventListener(event, (e) => e.stopPropagation());

      function picture(layer, head) {   // one head, a pixel for each weight
        const n = tokens.length, tile = make("canvas", { width: n, height: n }), brush = tile.getContext("2d");
        const pixels = brush.createImageData(n, n);
        for (let i = 0; i < n * n; i++)
          pixels.data.set([...shade(at(layer, head, Math.floor(i / n), i % n)), 255], 4 * i);
        brush.putImageData(pixels, 0, 0);
        return tile;
      }
      const CELL = 30, GAP = 4, EDGE = 30;   // pixels of the canvas, which shows them at half size
      let thumbnails = [];
      function drawOverview() {
        overview.width = EDGE + n_layers * (CELL + GAP);
        overview.height = EDGE + n_heads * (CELL + GAP);
        overview.style.width = overview.width / 2 + "px";
        const brush = overview.getContext("2d");
        brush.fillStyle = "#e8e8e8";
        brush.fillRect(0, 0, overview.width, overview.height);
        brush.imageSmoothingEnabled = tokens.length > CELL;
        brush.fillStyle = "#222";
        brush.font = "20px system-ui, sans-serif";
        brush.textAlign = "center";
        const place = (i) => EDGE + i * (CELL + GAP);
        for (let l = 0; l < n_layers; l++) if (l % 5 === 0) brush.fillText(l, place(l) + CELL / 2, 22);
        for (let h = 0; h < n_heads; h++) brush.fillText(h, 14, place(h) + CELL / 2 + 7);
        thumbnails.forEach((tile, i) =>
          brush.drawImage(tile, place(Math.floor(i / n_heads)), place(i % n_heads), CELL, CELL));
        brush.strokeStyle = "#B34700";
        brush.lineWidth = 6;
        brush.strokeRect(place(model.get("layer")) - 3, place(model.get("head")) - 3, CELL + 6, CELL + 6);
      }
      function drawMap() {
        const n = tokens.length, size = Math.max(4, Math.floor(440 / n)), brush = map.getContext("2d");
        map.width = map.height = n * size;
        brush.imageSmoothingEnabled = false;
        brush.drawImage(picture(model.get("layer"), model.get("head")), 0, 0, n * size, n * size);
        brush.strokeStyle = "#B34700";
        brush.lineWidth = 4;
        const line = [2, chosen * size, n * size - 4, size];
        brush.strokeRect(...(backwards ? [line[1], line[0], line[3], line[2]] : line));
      }
      function drawTokens() {
        [...strip.children].forEach((card, i) => {
          const value = weight(i), can = possible(i), word = can ? percent(value) : "–";
          card.style.background = `rgb(${shade(can ? value : 0).map(Math.round)})`;
          card.lastChild.previousSibling.textContent = word;
          card.lastChild.style.width = (can ? 100 * value : 0) + "%";
          card.tabIndex = i === chosen ? 0 : -1;
          card.ariaPressed = String(i === chosen);
          card.ariaLabel = `${tokens[i]} ${word}, token ${i}${can ? "" : ", out of sight"}`;
          card.classList.toggle("attention-out", !can);
        });
        const best = tokens.map((_, i) => i).filter(possible).sort((a, b) => weight(b) - weight(a)).slice(0, 3);
        said.textContent = `Layer ${model.get("layer")}, head ${model.get("head")}: `
          + `“${tokens[chosen]}” (token ${chosen}) ` + (backwards ? "is looked at by " : "looks at ")
          + best.map((i) => `“${tokens[i]}” (${i}) ${percent(weight(i))}`).join(", ") + ".";
        map.ariaLabel = "Map of this head: rows look, columns are looked at. " + said.textContent;
      }
      function choose(i, focus) {
        chosen = Math.min(Math.max(i, 0), tokens.length - 1);
        drawTokens();
        drawMap();
        if (focus) strip.children[chosen].focus();
      }
      function card(token, i) {
        const node = make("button", { type: "button" }, make("span", { textContent: token }), " ",
          make("small"), make("i", { ariaHidden: "true" }));
        node.addEventListener("pointerenter", () => choose(i));
        node.addEventListener("click", () => choose(i));
        node.addEventListener("focus", () => { if (i !== chosen) choose(i); });
        return node;
      }
      function drawHead() {
        layer.value = model.get("layer");
        head.value = model.get("head");
        [...marks.children].forEach((button, i) => {
          const mark = model.get("marks")[i];
          button.ariaPressed = String(mark.layer === model.get("layer") && mark.head === model.get("head"));
        });
        if (!tokens.length) return;
        drawOverview();
        choose(chosen);
      }
      function go(l, h) {
        model.set("layer", l);
        model.set("head", h);
        model.save_changes();
      }
      function read() {
        const reading = model.get("reading");
        el.style.opacity = 1;
        tokens = reading.tokens;
        for (const part of [strip, said, overview, map]) part.hidden = !tokens.length;
        note.textContent = reading.message;
        note.hidden = !reading.message;
        if (!tokens.length) return;
        weights = Uint8Array.from(atob(reading.weights), (c) => c.charCodeAt(0));
        [n_layers, n_heads] = [reading.n_layers, reading.n_heads];
        layer.replaceChildren(...Array.from({ length: n_layers }, (_, i) => new Option(i, i)));
        head.replaceChildren(...Array.from({ length: n_heads }, (_, i) => new Option(i, i)));
        thumbnails = Array.from({ length: n_layers * n_heads }, (_, i) =>
          picture(Math.floor(i / n_heads), i % n_heads));
        overview.ariaLabel = `Small maps of all heads: ${n_layers} columns of layers, ${n_heads} rows of heads.`;
        strip.replaceChildren(...tokens.map(card));
        chosen = tokens.length - 1;
        drawHead();
      }

      let timer;
      text.value = model.get("text");
      text.addEventListener("input", () => {
        clearTimeout(timer);
        timer = setTimeout(() => {
          if (text.value === model.get("text")) return;
          el.style.opacity = 0.6;
          model.set("text", text.value);
          model.save_changes();
        }, 300);
      });
      for (const select of [layer, head])
        select.addEventListener("change", () => go(Number(layer.value), Number(head.value)));
      direction.addEventListener("change", () => {
        backwards = direction.value === "by";
        choose(chosen);
      });
      marks.append(...model.get("marks").map((mark) => make("button", {
        type: "button", textContent: `${mark.name} (${mark.layer}.${mark.head})`,
        onclick: () => go(mark.layer, mark.head) })));
      strip.addEventListener("keydown", (e) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
        if (!step) return;
        e.preventDefault();
        choose(chosen + step, true);
      });
      const under = (canvas, e) => {   // where the pointer is, as shares of the canvas
        const box = canvas.getBoundingClientRect();
        return [(e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height];
      };
      map.addEventListener("pointermove", (e) =>
        choose(Math.floor(under(map, e)[backwards ? 0 : 1] * tokens.length)));
      overview.addEventListener("click", (e) => {
        const [x, y] = under(overview, e);
        const [l, h] = [x * overview.width, y * overview.height].map((v) => Math.floor((v - EDGE) / (CELL + GAP)));
        if (l >= 0 && h >= 0 && l < n_layers && h < n_heads) go(l, h);
      });
      const labelled = (name, input) => make("label", {}, make("span", { textContent: name }), input);
      el.classList.add("attention");
      el.append(labelled("Text", text),
        make("div", { className: "attention-bar" }, labelled("Layer", layer), labelled("Head", head),
          labelled("The chosen token", direction)),
        marks, strip, said, note, make("div", { className: "attention-bar" }, overview, map),
        make("small", { textContent: "Left: every head, a column for each layer, to click on. Right: the chosen "
          + "head; rows look, columns are looked at. Shades follow the root of a weight, so that small ones show." }));
      model.on("change:reading", read);
      model.on("change:layer", drawHead);
      model.on("change:head", drawHead);
      read();
      return () => {
        clearTimeout(timer);
        model.off("change:reading", read);
        model.off("change:layer", drawHead);
        model.off("change:head", drawHead);
      };
    }
    export default { render };
    """
    _css = themed("attention") + """
    .attention { font-family: system-ui, sans-serif; font-size: 14px; max-width: 60rem; }
    .attention [hidden] { display: none; }
    .attention-bar { display: flex; flex-wrap: wrap; gap: 6px 16px; margin: 6px 0; align-items: flex-start; }
    .attention label { display: flex; gap: 6px; align-items: center; }
    .attention label textarea { flex: 1; }
    .attention textarea, .attention select, .attention button {
      font: inherit; padding: 3px 6px; color: inherit; border: 1px solid #767676; border-radius: 3px;
      background: var(--jp-layout-color1, transparent); box-sizing: border-box; }
    .attention option { color: CanvasText; background: Canvas; }
    .attention-bar button[aria-pressed=true] { font-weight: bold; border: 2px solid #D55E00; }
    .attention-tokens { display: flex; flex-wrap: wrap; gap: 4px; margin: 8px 0; }
    .attention .attention-tokens button { color: black; border: 2px solid #767676; display: flex; cursor: pointer;
      flex-direction: column; align-items: stretch; min-width: 3.2em; text-align: center; padding: 2px 5px; }
    .attention .attention-tokens button[aria-pressed=true] { border: 3px solid #D55E00; padding: 1px 4px; }
    .attention .attention-tokens button.attention-out { border-style: dotted; color: #595959; }
    .attention-tokens small { font-variant-numeric: tabular-nums; font-weight: normal; }
    .attention-tokens i { height: 4px; background: black; }
    .attention p { margin: 6px 0; }
    .attention-tokens + p { min-height: 2.6em; }
    .attention-overview { max-width: 100%; cursor: pointer; }
    .attention-map { width: 170px; border: 1px solid #767676; }
    """


def _checked(tokens: Sequence[str], weights) -> tuple[list[str], np.ndarray]:
    weights = np.asarray(weights, dtype=np.float32)
    if not len(tokens):
        raise ValueError("The text has no token. Type something.")
    n = min(len(tokens), MAX_TOKENS)
    if weights.ndim != 4 or weights.shape[2] != weights.shape[3] or weights.shape[2] not in (n, len(tokens)):
        raise ValueError(f"Weights of shape {weights.shape} for {len(tokens)} tokens; they must be (layers, heads, "
                         f"{n}, {n}).")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() <= 1.001):
        raise ValueError(f"Attention weights lie between 0 and 1; these reach from {weights.min()} to "
                         f"{weights.max()}: were they taken before the softmax?")
    return list(tokens[:n]), weights[:, :, :n, :n]


def _packed(tokens: Sequence[str], weights) -> dict:
    """What the browser needs: the tokens, and the weights as bytes, 255 for 1."""
    shown, weights = _checked(tokens, weights)
    left_out = f"Shown are the first {len(shown)} of {len(tokens)} tokens." if len(tokens) > len(shown) else ""
    weights = np.rint(255 * weights).clip(0, 255).astype(np.uint8)
    return {"tokens": shown, "weights": base64.b64encode(weights.tobytes()).decode(), "message": left_out,
            "n_layers": weights.shape[0], "n_heads": weights.shape[1]}
