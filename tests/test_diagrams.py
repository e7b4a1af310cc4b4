"""Diagrams of modules: what they show is what ran, and it can be read."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from test_accessibility import SHAPE, TEXT, WHITE, contrast, lab, rgb
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ch03_attention.attention import MultiHeadAttention, RotaryEmbedding
from ch04_gpt.gpt import GPT, PRESETS, GPTConfig, SwiGLU, TransformerBlock
from ch04_gpt.mixture_of_experts import Router
from ch06_finetune.finetune import LoRALinear
from utils import diagrams
from utils.diagrams import describe_diagram, draw, record
from utils.diagrams.layout import FILLS


class Order(nn.Module):
    """Two branches beside a stream, in the order that ``how`` says."""

    def __init__(self, how: str, width: int = 8):
        super().__init__()
        self.how, self.norm1, self.norm2 = how, nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp, self.spare = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        if self.how == "pre":
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        if self.how == "post":
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        if self.how == "parallel":
            normed = self.norm1(x)
            return x + self.attention(normed) + self.mlp(normed)
        if self.how == "shared":
            return self.mlp(self.norm1(self.attention(self.norm1(x))))
        return self.mlp(self.attention(x))  # "plain"


class Scores(nn.Module):
    """Attention by hand: a second way past the scores, and a helper function."""

    def __init__(self):
        super().__init__()
        self.w_qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(mix(*cut(self.w_qkv(x))))


def cut(x):
    """It only moves numbers, and so is no box."""
    return x.chunk(3, dim=-1)


def mix(query, key, value):
    return (query @ key.transpose(-2, -1) / 4).softmax(-1) @ value


class Long(nn.Module):
    """Ways that reach over several rows, side by side, and one input at both ends."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        one = self.a(x)
        two = self.b(one).relu()
        three = self.c(torch.cat([two[..., :4], one[..., :4]], dim=-1))
        return self.d(three * two) + x + one


class Beside(nn.Module):
    """A branch with an addition and a product of its own: ways past boxes that stand above one another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        one = self.a(x)
        two = one + self.b(one)
        return x + self.d(two) * self.c(two.relu()).sigmoid() * two


def on_meta(name):
    with torch.device("meta"):
        return GPT(PRESETS[name]), torch.zeros(1, 8, dtype=torch.long)


def gallery():
    """What the tests of the drawing look at: {name: diagrams}."""
    x = torch.randn(1, 6, 8)
    shown = {how: record(Order(how), x) for how in ("pre", "post", "parallel", "shared", "plain")}
    shown["functions"] = record(Scores(), torch.randn(2, 5, 16), look_into=("mix",))
    shown |= {"long ways": record(Long(), x), "ways beside": record(Beside(), x)}
    shown["gate"] = record(SwiGLU(16, 32), torch.randn(1, 3, 16))
    rope = RotaryEmbedding(8, 64)
    shown["shared keys"] = record(MultiHeadAttention(48, 6, 2, rope=rope, qk_norm=True), torch.randn(2, 10, 48))
    shown["LoRA"] = record(LoRALinear(nn.Linear(576, 960, bias=False), 8, 16), torch.randn(1, 6, 576))
    shown["PyTorch's"] = record(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), x, depth=2)
    pages = {name: {"": diagram} for name, diagram in shown.items()}
    models = {name: on_meta(name) for name in ("gpt2-124m", "smollm2-135m")}
    for depth in (1, 2, 3):
        pages |= {f"{n}, {depth}": {"": record(*model, depth=depth)} for n, model in models.items()}
    blocks = {n: (m.blocks[0], torch.zeros(1, 8, m.config.d_model, device="meta")) for n, (m, _) in models.items()}
    return pages | {"side by side": {n: record(*block, depth=2) for n, block in blocks.items()}}


@pytest.fixture(scope="module")
def pages():
    return gallery()


@pytest.fixture(scope="module")
def drawings(pages):
    """{name: (figure, its axes, a renderer)}."""
    return {name: drawn(page) for name, page in pages.items()}


def drawn(page):
    fig = draw(page, "What happens here")
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return fig, fig.axes[0], canvas.get_renderer()


def boxes(diagram):
    """All that is drawn as a box with nothing inside, with how often it stands for."""
    for node in diagram.nodes:
        if node.inside is not None:
            yield from ((box, times * node.times) for box, times in boxes(node.inside))
        elif node.kind not in ("input", "output", "sum", "product"):
            yield node, node.times


def sources(diagram, node):
    return {edge.source.name for edge in diagram.into(node)}


def node_of(diagram, name):
    return next(node for node in diagram.nodes if node.name == name)


# ---------------------------------------------------------------- what ran


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ["gpt2-124m", "smollm2-135m", "qwen3-0.6b"])
def test_the_weights_in_the_boxes_are_all_weights_of_the_model(name, depth):
    model, ids = on_meta(name)
    diagram = record(model, ids, depth=depth)
    counted = sum(math.prod(shape) for shape in {id(p): p.shape for p in model.parameters()}.values())
    assert diagram.parameters == counted
    assert sum(box.parameters * times for box, times in boxes(diagram) if not box.shared) == counted


@pytest.mark.parametrize("name", ["gpt2-124m", "qwen3-0.6b"])
def test_shapes_on_the_arrows_are_those_that_the_modules_saw(name):
    model, ids = on_meta(name)
    seen = {}

    def note(module, given, out):
        if isinstance(out, torch.Tensor):
            seen.setdefault(paths[module], (tuple(given[0].shape), tuple(out.shape)))

    paths = {module: path for path, module in model.named_modules()}
    hooks = [module.register_forward_hook(note) for module in paths]
    model(ids)
    for hook in hooks:
        hook.remove()
    checked = 0
    for diagram, path in [(record(model, ids), ""), (record(model.blocks[0], torch.zeros(
            1, 8, model.config.d_model, device="meta"), depth=2), "blocks.0.")]:
        for node in (node for node in diagram.nodes if node.kind == "module"):
            inside, outside = seen[path + node.name.replace("blocks", "blocks.0")]
            assert {edge.shape for edge in diagram.into(node)} == {inside}
            assert node.made == outside
            checked += 1
    assert checked >= 8


def test_additions_stand_where_they_happen():
    x = torch.randn(1, 6, 8)
    pre, post, parallel, plain = (record(Order(how), x) for how in ("pre", "post", "parallel", "plain"))
    sums = {how: [sources(d, n) for n in d.nodes if n.kind == "sum"]
            for how, d in (("pre", pre), ("post", post), ("parallel", parallel), ("plain", plain))}
    assert sums == {"pre": [{"x", "attention"}, {"+", "mlp"}], "post": [{"x", "attention"}, {"norm1", "mlp"}],
                    "parallel": [{"x", "attention"}, {"+", "mlp"}], "plain": []}
    assert sources(pre, node_of(pre, "norm1")) == {"x"} and sources(pre, node_of(pre, "norm2")) == {"+"}
    assert sources(post, node_of(post, "norm1")) == {"+"} and sources(post, node_of(post, "attention")) == {"x"}
    assert all(sources(parallel, node_of(parallel, branch)) == {"norm1"} for branch in ("attention", "mlp"))
    assert len({describe_diagram(diagram) for diagram in (pre, post, parallel, plain)}) == 4


def test_the_course_s_block_is_pre_norm_and_with_its_forward_replaced_it_is_what_the_new_one_does():
    block, x = TransformerBlock(GPTConfig(6, 8, 12, 2, 3)), torch.randn(1, 8, 12)
    diagram = record(block, x)
    assert [sources(diagram, n) for n in diagram.nodes if n.kind == "sum"] == [{"x", "attention"}, {"+", "mlp"}]
    block.forward = lambda x, b=block: (lambda x: b.norm2(x + b.mlp(x)))(b.norm1(x + b.attention(x)))
    after = record(block, x)
    assert sources(after, node_of(after, "norm1")) == {"+"}
    assert sources(after, node_of(after, "attention")) == {"x"}


def test_a_module_used_twice_stands_there_twice_and_one_that_is_skipped_does_not():
    diagram = record(Order("shared"), torch.randn(1, 6, 8))
    names = [node.name for node in diagram.nodes if node.kind == "module"]
    assert names == ["norm1", "attention", "norm1", "mlp"]  # not norm2, not spare
    first, second = (node for node in diagram.nodes if node.name == "norm1")
    assert not first.shared and second.shared == "norm1"
    assert "spare" not in describe_diagram(diagram)
    bend = nn.Tanh()
    twice = record(nn.Sequential(bend, bend), torch.ones(1, 4))
    assert [(n.class_name, n.times) for n in twice.nodes if n.kind == "module"] == [("Tanh", 1)] * 2


def test_a_module_that_hands_on_what_it_was_given_is_not_drawn():
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Dropout(0.5), nn.ReLU(inplace=True))
    assert [n.class_name for n in record(model, torch.ones(1, 4)).nodes if n.kind == "module"] == [
        "Linear", "Dropout", "ReLU"]
    assert [n.class_name for n in record(model.eval(), torch.ones(1, 4)).nodes if n.kind == "module"] == [
        "Linear", "ReLU"]


def test_equal_blocks_that_follow_one_another_are_folded_and_others_are_not():
    config = GPTConfig(16, 8, 12, 5, 3)
    model, ids = GPT(config), torch.zeros(1, 8, dtype=torch.long)
    assert node_of(record(model, ids), "blocks").times == 5
    model.blocks[2].mlp = nn.Linear(12, 12)
    diagram = record(model, ids, depth=2)
    assert [(n.name, n.times) for n in diagram.nodes if n.name.startswith("blocks")] == [
        ("blocks", 2), ("blocks.2", 1), ("blocks", 2)]
    model.blocks[1] = model.blocks[0]  # the same one again is no further one
    assert [n.times for n in record(model, ids).nodes if n.name.startswith("blocks")][:2] == [1, 1]


def test_what_is_no_module_is_seen_too():
    gate = record(SwiGLU(16, 32), torch.randn(1, 3, 16))
    product = node_of(gate, "×")
    assert product.kind == "product" and sources(gate, product) == {"silu", "w_up"}
    lora = record(LoRALinear(nn.Linear(6, 10), 2, 4), torch.randn(3, 6))
    assert sources(lora, node_of(lora, "+")) == {"base", "lora_b"}  # one fused function adds and multiplies
    assert (node_of(lora, "lora_a").parameters, node_of(lora, "lora_b").parameters) == (12, 20)
    assert node_of(lora, "base").frozen and not node_of(lora, "lora_a").frozen
    theirs = record(nn.MultiheadAttention(8, 2), *[torch.randn(6, 1, 8)] * 3)
    assert node_of(theirs, "multi_head_attention_forward").parameters == theirs.parameters == 4 * 8 * 8 + 4 * 8
    positions = record(*on_meta("gpt2-124m"))
    table = node_of(positions, "position_embedding")
    assert table.kind == "weight" and table.parameters == 1024 * 768
    assert sources(positions, node_of(positions, "+")) == {"token_embedding", "position_embedding"}
    assert node_of(positions, "lm_head").shared == "token_embedding"


def test_queries_and_keys_are_turned_and_values_are_not():
    diagram = record(MultiHeadAttention(48, 6, 2, rope=RotaryEmbedding(8, 64)), torch.randn(2, 10, 48))
    arriving = diagram.into(node_of(diagram, "causal_attention"))
    given = {edge.name: (edge.source.name, edge.shape) for edge in arriving}
    assert given == {"query": ("rope.rotate", (2, 6, 10, 8)), "key": ("rope.rotate", (2, 2, 10, 8)),
                     "value": ("w_qkv", (2, 2, 10, 8))}


def test_a_function_is_one_box_until_it_is_looked_into():
    x = torch.randn(2, 5, 16)
    closed, opened = record(Scores(), x), record(Scores(), x, look_into=("mix",))
    assert [n.name for n in closed.nodes] == ["x", "w_qkv", "mix", "out", ""]
    assert [n.name for n in opened.nodes] == [
        "x", "w_qkv", "matrix product", "÷ 4", "softmax", "matrix product", "out", ""]
    scores = opened.out_of(node_of(opened, "matrix product"))
    assert [edge.shape for edge in scores] == [(2, 5, 5)]


def test_the_module_and_the_random_numbers_stay_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    before, x = torch.get_rng_state(), torch.ones(1, 4)
    record(model, x)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        record(model, torch.ones(1, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="depth is 0"):
        record(model, x, depth=0)


def test_the_random_numbers_of_all_gpus_in_use_are_kept(monkeypatch):
    kept = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: kept.append({*map(str, devices)}) or nullcontext())
    with FakeTensorMode():  # tensors without numbers, on devices that need not be there
        record(nn.Dropout(0.5), torch.empty(9, device="cuda:1"))
        record(nn.LayerNorm(9, device="cuda:0"), torch.empty(9, device="cuda:0"))
    record(nn.LayerNorm(9), torch.empty(9))
    assert kept == [{"cuda:1"}, {"cuda:0"}, set()]


def test_inference_mode_changes_no_diagram():
    bends = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Identity())
    for model, x in ((GPT(GPTConfig(6, 8, 12, 2, 3)), torch.tensor([[1, 2]])), (bends, torch.ones(1, 4))):
        with torch.inference_mode():
            inside = record(model, x.clone())
            assert torch.is_inference_mode_enabled()
        assert describe_diagram(inside) == describe_diagram(record(model, x))


def test_a_constant_in_the_shape_of_weights_is_no_weight():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x) * torch.ones(1).expand_as(self.weight)

    assert [node.name for node in record(Spread(), torch.ones(2, 3)).nodes] == ["x", "inner", "× constant", ""]


# ---------------------------------------------------------------- what is drawn


def test_words_do_not_overlap_and_stay_inside(drawings):
    for name, (fig, axes, renderer) in drawings.items():
        texts = [text for text in axes.texts if text.get_text()]
        extents = [text.get_window_extent(renderer).padded(-0.5) for text in texts]
        for (one, a), (other, b) in itertools.combinations(zip(texts, extents, strict=True), 2):
            assert not a.overlaps(b), f"{name}: {one.get_text()!r} lies on {other.get_text()!r}"
        for text, box in zip(texts, extents, strict=True):
            assert inside(box, fig.bbox), f"{name}: {text.get_text()!r} leaves the figure"


def test_boxes_do_not_overlap_unless_one_is_in_the_other_and_words_keep_to_theirs(drawings):
    for name, (_, axes, renderer) in drawings.items():
        found = [p.get_window_extent(renderer) for p in axes.patches if isinstance(p, (FancyBboxPatch, Circle))]
        for a, b in itertools.combinations(found, 2):
            apart = not a.padded(-1).overlaps(b.padded(-1))
            assert apart or inside(a, b) or inside(b, a), f"{name}: two boxes overlap at {a} and {b}"
        for text in axes.texts:
            words = text.get_window_extent(renderer).padded(-0.5)
            for box in found:
                clear = not words.overlaps(box) or inside(words, box)
                assert clear, f"{name}: {text.get_text()!r} crosses an edge"


def inside(a, b):
    return a.x0 >= b.x0 - 1 and a.x1 <= b.x1 + 1 and a.y0 >= b.y0 - 1 and a.y1 <= b.y1 + 1


def test_no_line_runs_through_a_box_or_through_words(drawings):
    for name, (_, axes, renderer) in drawings.items():
        closed = [p.get_window_extent(renderer).padded(-3) for p in axes.patches
                  if isinstance(p, (FancyBboxPatch, Circle)) and p.get_zorder() > 1]
        words = [text.get_window_extent(renderer).padded(-0.5) for text in axes.texts if text.get_text()]
        for arrow in (p for p in axes.patches if isinstance(p, FancyArrowPatch)):
            corners = axes.transData.transform(arrow._path_original.vertices)
            for start, end in itertools.pairwise(corners):
                for box in closed + words:
                    assert not crosses(start, end, box), f"{name}: a line from {start} to {end} crosses {box}"


def crosses(start, end, box):
    """A level or upright line through a box?"""
    (x0, x1), (y0, y1) = sorted((start[0], end[0])), sorted((start[1], end[1]))
    return x0 < box.x1 and x1 > box.x0 and y0 < box.y1 and y1 > box.y0


def test_every_connection_is_drawn(pages, drawings):
    for name in ("pre", "parallel", "long ways", "ways beside", "shared keys"):
        (diagram,) = pages[name].values()
        _, axes, _ = drawings[name]
        pairs = {(id(edge.source), id(edge.target)) for edge in diagram.edges}
        assert sum(isinstance(p, FancyArrowPatch) for p in axes.patches) == len(pairs)


def test_it_can_be_read_in_print_and_in_grey(drawings):
    for name, (fig, axes, _) in drawings.items():
        if not name.endswith(", 3"):  # so deep, it is for a poster
            assert fig.get_figwidth() <= 6.6, f"{name} is {fig.get_figwidth():.2f} inches wide"
        assert min(text.get_fontsize() for text in axes.texts) >= 7
        assert all(contrast(rgb(text.get_color()), WHITE) >= TEXT for text in axes.texts)
    for fill, edge in FILLS.values():
        assert contrast(rgb("black"), rgb(fill)) >= TEXT and contrast(rgb(edge), WHITE) >= SHAPE
    grey = sorted(lab(rgb(fill))[0] for fill, _ in FILLS.values())
    assert min(b - a for a, b in itertools.pairwise(grey)) >= 3.5, "two fills are alike in grey print"


def test_side_by_side_only_the_differences_have_thick_frames(pages):
    page = pages["side by side"]
    marked = diagrams.trace.only_here(list(page.values()))
    names = [{node.name for node in marked if node in all_nodes(diagram)} for diagram in page.values()]
    assert names == [{"norm1", "norm2", "mlp", "activation"},
                     {"norm1", "norm2", "mlp", "w_gate", "silu", "rope.rotate", "×"}]
    assert not diagrams.trace.only_here([next(iter(page.values()))] * 2)


def all_nodes(diagram):
    return set(diagram.nodes).union(*(all_nodes(node.inside) for node in diagram.nodes if node.inside))


def test_the_words_name_every_box_and_end_as_a_sentence(pages):
    for page in pages.values():
        for diagram in page.values():
            words = describe_diagram(diagram)
            assert words.endswith(".") and "{" not in words and "  " not in words
            assert all(box.name in words for box, _ in boxes(diagram))
    assert describe_diagram(pages["pre"][""]).endswith("Out comes (1, 6, 8).")


def test_the_words_name_all_that_comes_out():
    words = describe_diagram(record(Router(16, 4, 2), torch.randn(3, 16)))
    assert words.endswith(". Out come scores, topk and div.") and " in ." not in words


def test_a_notebook_gets_the_picture_with_its_words(monkeypatch):
    shown = []
    monkeypatch.setattr(diagrams, "show", lambda fig, alt: shown.append((fig, alt)))
    diagrams.plot_module(Order("pre"), torch.randn(1, 6, 8), title="One block")
    diagrams.plot_modules({how: (Order(how), torch.randn(1, 6, 8)) for how in ("pre", "post")}, title="Two blocks")
    assert shown[0][1].startswith("Diagram. Order, ")
    assert "pre: Order" in shown[1][1] and "post: Order" in shown[1][1]
