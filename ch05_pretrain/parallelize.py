"""Chapter 5, for many processes: the unmodified GPT spread over a mesh, by PyTorch's own engine.

``ManyProcesses`` is what ``train`` takes in place of ``OneProcess`` when ``torchrun`` has started several
processes. The mesh has four directions, and each is one library:

    dp    every process holds everything, gradients are averaged     DistributedDataParallel
    fsdp  parameters, gradients and optimizer state in slices        fully_shard (FSDP2)
    tp    every matrix cut in pieces, the stream whole               parallelize_module with the table below
    pp    the blocks cut in stages, micro-batches pass through       torch.distributed.pipelining

On a GPU they talk through NCCL, on a CPU through gloo. parallelism.ipynb takes each of them apart.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from ch02_tokenizer.tokenizer import file_sha256
from ch04_gpt.gpt import GPT, GPTConfig
from ch05_pretrain.pretrain import (
    CHECKPOINT_FORMAT,
    Evaluation,
    History,
    OneProcess,
    TokenLoader,
    TrainConfig,
    autocast,
    check_record,
    checkpoint_record,
    cross_entropy,
    evaluate,
    finish_folder,
    make_optimizer,
    random_states,
    read_checkpoint,
    remove_old_checkpoints,
    set_random_states,
)
from utils.device import wanted_device
from utils.workspace import explain_disk_error, short_path

logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # speaks of speed only
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # nobody changes the logits

DIRECTIONS = ("pp", "dp", "fsdp", "tp")  # from the processes that talk least to those that talk most

# Which layer is cut how. A column-wise layer makes a slice of the outputs on each process, a row-wise one takes a
# slice of the inputs, and the sum over processes is its output: two layers, one exchange. Shoeybi et al. 2019
# (Megatron-LM), section 3. "Sequence" here cuts dimension 1 of queries and keys, the heads.
TENSOR_PARALLEL: dict[str, Callable[[], ParallelStyle]] = {
    "token_embedding": lambda: RowwiseParallel(input_layouts=Replicate()),
    "blocks.*.attention.w_qkv": ColwiseParallel,
    "blocks.*.attention.[qk]_norm": lambda: SequenceParallel(sequence_dim=1, use_local_output=True),
    "blocks.*.attention.out_proj": RowwiseParallel,
    "blocks.*.mlp": lambda: PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
    "blocks.*.mlp.w_gate": ColwiseParallel,  # gets its input from there, as w_up does: their gradients need one sum
    "blocks.*.mlp.w_up": ColwiseParallel,
    "blocks.*.mlp.w_down": RowwiseParallel,
    "lm_head": lambda: ColwiseParallel(output_layouts=Replicate()),
}


@dataclass(frozen=True)
class Layout:
    """How many processes stand in each direction of the mesh."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1

    @classmethod
    def of(cls, processes: int, dp: int | None = None, fsdp: int = 1, tp: int = 1, pp: int = 1) -> "Layout":
        """The layout of so many processes; ``dp`` is what is left if it is not given.

        ``ValueError`` unless the four multiply to ``processes``.
        """
        for name, value in {"dp": dp or 1, "fsdp": fsdp, "tp": tp, "pp": pp}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        others = fsdp * tp * pp
        layout = cls(dp or max(processes // others, 1), fsdp, tp, pp)
        if layout.size != processes:
            mend = (f"--dp {processes // others} would do" if processes % others == 0
                    else f"fsdp x tp x pp = {others} must divide {processes}")
            raise ValueError(f"The mesh {layout} has {layout.size} places, but there are {processes} processes: "
                             f"{mend}, or start {layout.size} processes (torchrun --nproc-per-node {layout.size}).")
        return layout

    @property
    def size(self) -> int:
        """How many processes it takes."""
        return self.dp * self.fsdp * self.tp * self.pp

    @property
    def data_ranks(self) -> int:
        """In how many parts the batch is cut."""
        return self.dp * self.fsdp

    def __str__(self) -> str:
        return f"dp {self.dp} x fsdp {self.fsdp} x tp {self.tp} x pp {self.pp}"


def check_layout(layout: Layout, model_config: GPTConfig, train_config: TrainConfig) -> None:
    """``ValueError``, with the value, the bound and the mend, if this model cannot be spread so."""
    tp, pp = layout.tp, layout.pp
    for name in ("n_heads", "n_kv_heads", "d_ff"):
        value = getattr(model_config, name)
        if value % tp:
            fit = ", ".join(str(n) for n in range(1, value + 1) if value % n == 0 and n <= 64)
            raise ValueError(f"{name} is {value}, which tp {tp} does not divide: choose tp from {fit}.")
    if tp > 1 and model_config.dropout:
        raise ValueError(f"dropout is {model_config.dropout} with tp {tp}: the pieces of one matrix would drop the "
                         "same positions. Set dropout to 0, or use fsdp in place of tp.")
    if pp > model_config.n_layers:
        raise ValueError(f"pp is {pp}, but there are {model_config.n_layers} blocks to share out: pp must be from 1 to "
                         f"{model_config.n_layers}.")
    if train_config.precision == "float16":
        raise ValueError("precision is float16, whose loss scale is kept by one process only: with many processes "
                         "choose bfloat16 or float32.")
    rows = train_config.batch_size
    if rows % (layout.data_ranks * micro_batches(layout, train_config)):
        raise ValueError(f"batch_size is {rows}, to be cut in {layout.data_ranks} data ranks x "
                         f"{micro_batches(layout, train_config)} micro-batches: make it a multiple of "
                         f"{layout.data_ranks * micro_batches(layout, train_config)}.")


def micro_batches(layout: Layout, train_config: TrainConfig) -> int:
    """In how many micro-batches a process cuts its share of a step: ``accumulate`` if that is above 1.

    A pipeline needs several to keep its stages busy: without that choice, up to four a stage.
    """
    if train_config.accumulate > 1 or layout.pp == 1:
        return train_config.accumulate
    rows = max(train_config.batch_size // layout.data_ranks, 1)
    return max(n for n in range(1, min(rows, 4 * layout.pp) + 1) if rows % n == 0)


def head_order(n_heads: int, n_kv_heads: int, head_dim: int, tp: int) -> Tensor:
    """In which order the rows of ``w_qkv`` must lie so that piece r of ``tp`` equal ones holds whole heads.

    The layer has all query heads first, then the keys', then the values'; cut as it is, the first process would get
    queries only. -> int64 ((H + 2 K) d,): row i of the reordered matrix is row order[i] of the model's.
    """
    rows = torch.arange((n_heads + 2 * n_kv_heads) * head_dim)
    kinds = rows.split([n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim])
    return torch.cat([piece for r in range(tp) for piece in (kind.chunk(tp)[r] for kind in kinds)])


def is_fused(name: str) -> bool:
    """Whether this parameter's rows are queries, keys and values, which tensor parallel reorders."""
    return ".attention.w_qkv." in name


class PipelinePart(nn.Module):
    """What one stage of the pipeline keeps of a GPT, under the same names; stage 0 embeds, the last one predicts.

    forward: token ids (B, T) or the stream (B, T, D) -> the stream, or logits (B, T, V) on the last stage.
    """

    def __init__(self, model: nn.Module, stage: int, stages: int):
        super().__init__()
        self.config, n_layers = model.config, len(model.blocks)
        first, last = stage == 0, stage == stages - 1
        self.token_embedding = model.token_embedding if first else None
        self.position_embedding = model.position_embedding if first else None
        self.dropout = model.dropout
        mine = range(n_layers * stage // stages, n_layers * (stage + 1) // stages)
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in mine})
        self.norm, self.lm_head = (model.norm, model.lm_head) if last else (None, None)
        self.precision = nullcontext  # makes the context of a forward pass
        if last and self.config.tie_embeddings:  # a copy of its own; their gradients are added up after each step
            self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone(), self.lm_head.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        with self.precision():
            if self.token_embedding is not None:
                x = self.token_embedding(x)
                if self.position_embedding is not None:
                    x = x + self.position_embedding.weight[: x.size(1)]
                x = self.dropout(x)
            for block in self.blocks.values():
                x = block(x)
            return x if self.lm_head is None else self.lm_head(self.norm(x))

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device


class Whole:
    """A pipeline as ``evaluate`` needs it: called with token ids on every process, it gives every one the logits."""

    def __init__(self, part: PipelinePart, run: Callable[[Tensor], Tensor]):
        self.part, self.run, self.config, self.device = part, run, part.config, part.device

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self.run(token_ids)

    @property
    def training(self) -> bool:
        """Whether the part is in training mode."""
        return self.part.training

    def eval(self) -> None:
        """Evaluation mode."""
        self.part.eval()

    def train(self, mode: bool = True) -> None:
        """Training mode."""
        self.part.train(mode)


class Lost(RuntimeError):
    """Another process is gone, or has not answered within the time limit."""


LOST = re.compile(r"connection|closed|timed? ?out|peer|unreachable|socket|nccl|gloo|wait.*(recv|send)", re.IGNORECASE)


def explain_lost_process(method):
    """Let a method of ``ManyProcesses`` say what to do when another process has gone or does not answer."""
    @functools.wraps(method)
    def explained(self, *arguments, **options):
        try:
            return method(self, *arguments, **options)
        except RuntimeError as error:
            if isinstance(error, Lost) or not LOST.search(f"{error} {error.__cause__}"):
                raise
            first_line = (str(error.__cause__ or error).strip().splitlines() or [""])[0]
            raise Lost(
                f"Process {dist.get_rank()} of {dist.get_world_size()} lost another process in "
                f"{method.__name__} ({first_line[:160]}). Look for the first error above: it is that one's. Then "
                "start the same command again; it goes on from the last checkpoint.") from error
    return explained


class ManyProcesses(OneProcess):
    """A training step carried out by all processes that ``torchrun`` has started, on the mesh dp x fsdp x tp x pp.

    ``dp`` None or 0: what is left of the processes. ``timeout``: seconds after which a process that does not answer
    counts as lost. ``ValueError`` if the mesh does not multiply to the number of processes.
    """

    def __init__(self, dp: int | None = None, fsdp: int = 1, tp: int = 1, pp: int = 1, *,
                 device: torch.device | str | None = None, timeout: float = 50.0):
        started = dist.is_initialized()
        processes = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
        self.layout = Layout.of(processes, dp, fsdp, tp, pp)  # before anybody waits for anybody
        local = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.device(device or wanted_device()).type == "cuda"
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        limit = timedelta(seconds=timeout)
        if not started:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
        shape = tuple(getattr(self.layout, name) for name in DIRECTIONS)
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=DIRECTIONS)
        for name in DIRECTIONS:
            dist.distributed_c10d._set_pg_timeout(limit, self.mesh.get_group(name))
        self.patient = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))  # for files, which take longer
        self.ends = self._pipeline_ends(limit)
        here = dict(zip(DIRECTIONS, self.mesh.get_coordinate(), strict=True))
        self.stage = here["pp"]
        self.rank, self.ranks = here["dp"] * self.layout.fsdp + here["fsdp"], self.layout.data_ranks
        self.dropout_seed = self.rank + self.ranks * self.stage  # tp's pieces share one: they have no dropout
        self.is_main = dist.get_rank() == 0
        self.model: nn.Module | None = None  # as prepared
        self.run: nn.Module | None = None  # what makes forward passes: the model, or DDP around it
        self.copy: nn.Parameter | None = None  # the last stage's copy of a tied embedding
        self.scale = 1.0  # of the losses of a step
        self.schedules: dict[tuple, PipelineScheduleSingle] = {}  # by the shape of a batch

    def _pipeline_ends(self, limit: timedelta) -> dist.ProcessGroup | None:
        """The group of this process's first and last stage, which share the embedding; None without a pipeline."""
        mine = None
        if self.layout.pp > 1:
            first, last = self.mesh.mesh[0].flatten().tolist(), self.mesh.mesh[-1].flatten().tolist()
            for ranks in zip(first, last, strict=True):  # every process must take part in making every group
                group = dist.new_group(list(ranks), timeout=limit)
                mine = group if dist.get_rank() in ranks else mine
        return mine

    # --- the model -------------------------------------------------------------------------------------------

    @explain_lost_process
    def prepare(self, model: GPT, config: TrainConfig) -> nn.Module:
        """Spread the model over the mesh, in place; with a pipeline, this process's part of it is returned.

        All begin with the weights of process 0. ``ValueError`` if the model cannot be spread so.
        """
        check_layout(self.layout, model.config, config)
        model.to(self.device)
        with torch.no_grad():
            for parameter in model.parameters():
                dist.broadcast(parameter, 0)
        if self.layout.pp > 1:
            model = PipelinePart(model, self.stage, self.layout.pp)
            model.precision = functools.partial(autocast, self.device, config.precision)
        if self.layout.tp > 1:
            cut_matrices(model, self.mesh["tp"])
        if config.compile:
            for block in blocks_of(model):
                block.compile()
        self.run = self._share_data(model)
        self.model, self.copy = model, self._shared_embedding(model) if self.stage > 0 else None
        self.schedules.clear()
        return model

    def _share_data(self, model: nn.Module) -> nn.Module:
        """Tell the libraries that the batch is cut: DDP where that is all, FSDP2 else (its shards may be one)."""
        layout = self.layout
        if layout.data_ranks == 1:
            return model
        if layout.fsdp == layout.tp == layout.pp == 1:
            return DistributedDataParallel(model, process_group=self.mesh.get_group("dp"), forward_sync_buffers=False)
        mesh = self.mesh["dp", "fsdp"] if layout.dp > 1 else self.mesh["fsdp"]
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=layout.pp == 1)
        return fully_shard(model, mesh=mesh)

    # --- a step ----------------------------------------------------------------------------------------------

    @explain_lost_process
    def forward_backward(self, model: nn.Module, inputs: Tensor, targets: Tensor, config: TrainConfig) -> float:
        """The mean loss in nats per token over all processes; its gradients are left in ``.grad``.

        inputs, targets int64 (B / data ranks, T): this data rank's rows.
        """
        tokens = self._sum_over_data(targets.numel())
        self.scale = self.ranks / tokens  # the libraries divide sums over processes by their number
        step = self._pipeline_step if self.layout.pp > 1 else self._plain_step
        total = self._sum_over_data(step(inputs, targets, config))
        self._settle_gradients(model)
        return total / tokens

    def _plain_step(self, inputs: Tensor, targets: Tensor, config: TrainConfig) -> float:
        """Micro-batches one after the other, gradients exchanged with the last; the sum of the losses."""
        pieces, total = micro_batches(self.layout, config), 0.0
        for index, (x, y) in enumerate(zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True)):
            with self._exchanging(index == pieces - 1):
                with autocast(self.device, config.precision):
                    logits = self.run(x)
                loss = self._scaled_loss(logits, y)
                loss.backward()
            total += loss.item() / self.scale
        return total

    @contextmanager
    def _exchanging(self, now: bool) -> Iterator[None]:
        """Whether gradients go round at the end of this backward pass, or wait for those of the next."""
        if isinstance(self.run, FSDPModule):
            self.run.set_requires_gradient_sync(now)
        with self.run.no_sync() if isinstance(self.run, DistributedDataParallel) and not now else nullcontext():
            yield

    def _pipeline_step(self, inputs: Tensor, targets: Tensor, config: TrainConfig) -> float:
        """All micro-batches through the stages and back; the sum of the losses, on every stage."""
        first, last = self.stage == 0, self.stage == self.layout.pp - 1
        schedule = self._schedule(inputs.shape, micro_batches(self.layout, config), self._scaled_loss)
        losses: list[Tensor] = []
        schedule.step(*([inputs] if first else []), target=targets if last else None, losses=losses if last else None,
                      return_outputs=False)
        total = torch.stack(losses).sum().detach() / self.scale if last else torch.zeros((), device=self.device)
        dist.all_reduce(total, group=self.mesh.get_group("pp"))  # the others add nothing
        return total.item()

    def _scaled_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A micro-batch's share of the loss, such that the libraries' averages over processes come out right."""
        return cross_entropy(logits.float(), targets) * (targets.numel() * self.scale)

    def _schedule(self, shape: torch.Size, pieces: int, loss: Callable | None) -> PipelineScheduleSingle:
        """The pipeline for batches of this shape: one forward and one backward in turn if there are enough pieces."""
        key = (tuple(shape), pieces, loss is None)
        if key not in self.schedules:
            stage = PipelineStage(self.run, self.stage, self.layout.pp, self.device, group=self.mesh.get_group("pp"))
            kind = Schedule1F1B if pieces >= self.layout.pp and loss is not None else ScheduleGPipe
            self.schedules[key] = kind(stage, pieces, loss_fn=loss, scale_grads=False)
        return self.schedules[key]

    def _logits(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V) on every stage."""
        schedule = self._schedule(token_ids.shape, 1, None)
        logits = schedule.eval(*([token_ids] if self.stage == 0 else []))
        if logits is None:
            logits = torch.empty(*token_ids.shape, self.model.config.vocab_size, device=self.device)
        logits = logits.float().contiguous()
        group = self.mesh.get_group("pp")
        dist.broadcast(logits, dist.get_global_rank(group, self.layout.pp - 1), group=group)
        return logits

    def _sum_over_data(self, value: float) -> float:
        """The sum over the data ranks, in double precision."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        for name in ("dp", "fsdp"):
            dist.all_reduce(total, group=self.mesh.get_group(name))
        return total.item()

    def _settle_gradients(self, model: nn.Module) -> None:
        """Gradients lie as their parameters do, and the two ends of a pipeline add up those of the shared embedding."""
        for parameter in model.parameters():
            if isinstance(parameter.grad, DTensor) and parameter.grad.placements != parameter.placements:
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)  # partial sums, added up
        shared = self._shared_embedding(model)
        if shared is not None and shared.grad is not None:
            dist.all_reduce(local(shared.grad), group=self.ends)

    def _shared_embedding(self, model: nn.Module) -> nn.Parameter | None:
        """This stage's copy of a tied embedding, if there are two."""
        if self.layout.pp == 1 or not model.config.tie_embeddings:
            return None
        if self.stage == 0:
            return model.token_embedding.weight
        return None if model.lm_head is None else model.lm_head.weight

    @explain_lost_process
    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale all gradients so that their joint length over all processes is at most ``max_norm``; the length before.

        Each process adds the squares of what it holds, divided by the number of processes that hold the same.
        """
        parameters = [p for p in parameters if p.grad is not None]
        together = dist.get_world_size() // self.layout.pp  # processes that a stage's parameters lie on
        square = torch.zeros((), device=self.device)
        for p in parameters:
            if p is not self.copy:  # the last stage's copy of a tied embedding is counted by the first
                square += local(p.grad).float().square().sum() * pieces_of(p.grad) / together
        dist.all_reduce(square)
        norm = square.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for p in parameters:
            local(p.grad).mul_(scale)
        return norm.item()

    @explain_lost_process
    def evaluate(self, model: nn.Module, tokens, config: TrainConfig) -> Evaluation:
        """As one process evaluates; every process computes the same, so that none waits for another."""
        whole = Whole(model, self._logits) if self.layout.pp > 1 else model
        with autocast(self.device, config.precision):
            result = evaluate(whole, tokens, max_tokens=config.eval_tokens, context_length=config.context_length)
        for module in model.modules():  # FSDP keeps what it gathered last, waiting for a backward pass
            if isinstance(module, FSDPModule):
                module.reshard()
        return result

    @explain_lost_process
    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    @explain_lost_process
    def barrier(self) -> None:
        """Wait until all are here, up to half an hour."""
        dist.barrier(group=self.patient)

    def close(self) -> None:
        """Leave the others in order; says nothing if they are gone already."""
        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()

    @explain_lost_process
    def first_bad_module(self, model: nn.Module, inputs: Tensor, targets: Tensor, config: TrainConfig) -> str:
        """Where, on which process, the loss of a batch stopped being a number. Every process runs the whole step."""
        bad: list[str] = []

        def watch(name: str):
            def hook(module, given, output):
                if isinstance(output, Tensor) and not local(output).isfinite().all():
                    bad.append(f"the output of {name}")
            return hook

        hooks = [module.register_forward_hook(watch(name or "the model")) for name, module in model.named_modules()]
        model.zero_grad()
        self.forward_backward(model, inputs, targets, config)
        for hook in hooks:
            hook.remove()
        for name, parameter in reversed(list(model.named_parameters())):  # the order of the backward pass
            if parameter.grad is not None and not local(parameter.grad).isfinite().all():
                bad.append(f"the gradient of {name}")
        model.zero_grad()
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, bad, group=self.patient)
        outputs_first = sorted(((told[0], rank) for rank, told in enumerate(found) if told),
                               key=lambda one: (not one[0].startswith("the output"), one[1]))
        return "{} on process {}".format(*outputs_first[0]) if outputs_first else ""

    # --- the whole model, and checkpoints --------------------------------------------------------------------

    @explain_lost_process
    def sample(self, model: nn.Module, write: Callable[[GPT], str]) -> str:
        """What ``write`` makes the whole model write, on process 0; "" on the others."""
        states = random_states(self.device)
        whole = self._whole_model()
        text = write(whole) if whole is not None else ""
        set_random_states(states, self.device)
        self.barrier()
        return text

    @explain_lost_process
    def export(self, model: nn.Module, folder: str | Path) -> None:
        """Write the whole model in the Hugging Face layout, by process 0."""
        whole = self._whole_model()
        if whole is not None:
            whole.save_pretrained(folder)
        self.barrier()

    def _whole_model(self) -> GPT | None:
        """An ordinary GPT with everybody's weights on process 0; None on the others."""
        here = self.mesh.get_coordinate()
        mine = {}
        for name, parameter in self._named(self.model):
            whole = self._model_order(name, parameter.detach())
            mine[name] = (whole.full_tensor() if isinstance(whole, DTensor) else whole).cpu()
        first_of_stage = not any(here[1:])
        gathered: list = [None] * dist.get_world_size()
        dist.gather_object(mine if first_of_stage else {}, gathered if self.is_main else None, group=self.patient)
        if not self.is_main:
            return None
        whole_model = GPT(self.model.config).to(self.device).eval()
        weights = {name: value for part in gathered for name, value in part.items()}
        with torch.no_grad():
            for name, parameter in whole_model.named_parameters():
                parameter.copy_(weights[name])
        return whole_model

    def _named(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names that they have in a GPT."""
        for name, parameter in model.named_parameters():
            yield ("token_embedding.weight" if parameter is self.copy else name), parameter

    def _model_order(self, name: str, tensor: Tensor, back: bool = False) -> Tensor:
        """A parameter, or a tensor of its optimizer, with rows as in the GPT; ``back``: as on this mesh."""
        if self.layout.tp == 1 or not is_fused(name):
            return tensor
        config = self.model.config
        order = head_order(config.n_heads, config.n_kv_heads, config.head_dim, self.layout.tp).to(self.device)
        whole = tensor.full_tensor()[order if back else order.argsort()]
        return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)

    @explain_lost_process
    def save(self, folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int,
             loader: TokenLoader, config: TrainConfig, history: History) -> Path:
        """A checkpoint that any number of processes can go on from: each writes what it holds, as safetensors.

        Whole or not at all, as ``save_checkpoint``. Written and read by torch.distributed.checkpoint.
        """
        target = Path(folder) / f"step-{step:06}"
        temporary = target.with_name(f".{target.name}.part")
        tensors: dict[str, Tensor] = {f"{key}.{dist.get_rank()}": value
                                      for key, value in random_states(self.device).items()}
        numbers = {}
        for name, parameter in self._named(model):
            tensors[f"model.{name}"] = self._model_order(name, parameter.detach())
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{slot}"] = self._model_order(name, value)
                else:
                    numbers[f"{name}.{slot}"] = value
        everyones: list[dict] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyones, numbers, group=self.patient)
        with self._together(target):
            if self.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with self._together(target):
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
                     process_group=self.patient)
        with self._together(target):
            if self.is_main:
                record = checkpoint_record(
                    model, step, loader, config, history, engine={}, layout=dataclasses.asdict(self.layout),
                    optimizer={key: value for part in everyones for key, value in part.items()},
                    sha256={file.name: file_sha256(file) for file in sorted(temporary.glob("*.safetensors"))})
                record["format"] = DISTRIBUTED_FORMAT
                (temporary / "state.json").write_text(json.dumps(record), encoding="utf-8")
                finish_folder(temporary, target)
                remove_old_checkpoints(folder, config.keep)
        return target

    @contextmanager
    def _together(self, target: Path) -> Iterator[None]:
        """If this block fails on one process, every process raises that error."""
        problem = None
        try:
            yield
        except (Exception, CheckpointException) as error:
            cause = first_cause(error)
            problem = f"{type(cause).__name__}: {explain_disk_error(cause, target)}"
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self.patient)
        if any(problems):
            if self.is_main:
                shutil.rmtree(target.with_name(f".{target.name}.part"), ignore_errors=True)
            raise OSError("; ".join(sorted({problem for problem in problems if problem})))

    @explain_lost_process
    @torch.no_grad()
    def load(self, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, loader: TokenLoader,
             config: TrainConfig) -> tuple[int, History]:
        """Go back to a checkpoint of any number of processes, of ``OneProcess`` too: (steps done, history)."""
        path = Path(path)
        record = self._read_record(path, model, config)
        reader = HuggingFaceStorageReader(str(path))
        held = reader.read_metadata().state_dict_metadata
        labels = {} if record["format"] == DISTRIBUTED_FORMAT else optimizer_labels(model.config, config)
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._named(model):
            tensors[f"model.{name}"] = torch.empty_like(parameter.detach())
            start = f"optimizer.{labels.get(name, name)}."
            for key in held:
                if key.startswith(start):
                    tensors[key] = torch.zeros_like(parameter.detach())
        same_mesh = record.get("layout") == dataclasses.asdict(self.layout)
        states = {f"{key}.{dist.get_rank()}": value for key, value in random_states(self.device).items()}
        if same_mesh:
            tensors |= states
        missing = sorted(set(tensors) - set(held))
        if missing:
            raise ValueError(f"The checkpoint {short_path(path)} lacks {missing[0]} and {len(missing) - 1} more "
                             "tensors. Delete it: training then goes on from the one before, or from the start.")
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self.patient)
        except CheckpointException as error:  # which is no Exception
            raise ValueError(f"The checkpoint {short_path(path)} cannot be read ({first_cause(error)}). Delete it: "
                             "training then goes on from the one before, or from the start.") from error
        loader.load_state_dict(record["loader"] or loader.state_dict() | {"position": record["step"]})
        optimizer.state.clear()
        for name, parameter in self._named(model):
            parameter.copy_(self._model_order(name, tensors[f"model.{name}"], back=True))
            start = f"{labels.get(name, name)}."
            slots = {key.removeprefix(f"optimizer.{start}"): self._model_order(name, value, back=True)
                     for key, value in tensors.items() if key.startswith(f"optimizer.{start}")}
            numbers = {key.removeprefix(start): value for key, value in record["optimizer"].items()
                       if key.startswith(start)}
            if slots or numbers:
                optimizer.state[parameter] = numbers | slots
        if same_mesh:
            set_random_states({key.rpartition(".")[0]: tensors[key] for key in states}, self.device)
        else:
            torch.manual_seed(config.seed + 1000 * record["step"] + self.dropout_seed)  # another mesh, other dropout
        return record["step"], History(**record["history"])

    def _read_record(self, path: Path, model: nn.Module, config: TrainConfig) -> dict:
        """The JSON part of a checkpoint, read and checked by process 0 for all."""
        answer: list = [None]
        if self.is_main:
            try:
                answer = [read_checkpoint(path)]
                check_record(answer[0], path, model, config)
            except ValueError as error:
                answer = [error]
        dist.broadcast_object_list(answer, 0, group=self.patient)
        if isinstance(answer[0], ValueError):
            raise answer[0]
        return answer[0]


DISTRIBUTED_FORMAT = f"{CHECKPOINT_FORMAT}, distributed"


def optimizer_labels(model_config: GPTConfig, config: TrainConfig) -> dict[str, str]:
    """Under which number one process's checkpoint keeps each parameter's optimizer state, by name."""
    with torch.device("meta"):  # names and shapes, no numbers
        model = GPT(model_config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, config).param_groups
    return {names[id(p)]: str(i) for i, p in enumerate(p for group in groups for p in group["params"])}


def first_cause(error: BaseException) -> BaseException:
    """The error itself, or the first of those that the processes of a checkpoint have met."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a GPT or of a part of one."""
    return list(model.blocks.values() if isinstance(model.blocks, nn.ModuleDict) else model.blocks)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pieces_of(tensor: Tensor) -> int:
    """In how many different pieces a tensor lies on the mesh."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(size for size, where in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
                     if not where.is_replicate())


def cut_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallel, in place: each layer that the table names is cut over ``mesh``, attention by whole heads."""
    tied = getattr(model, "lm_head", None) is not None and model.config.tie_embeddings \
        and model.token_embedding is not None
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    for block in blocks_of(model):
        layer = block.attention
        order = head_order(layer.n_heads, layer.n_kv_heads, layer.head_dim, mesh.size()).to(layer.w_qkv.weight.device)
        with torch.no_grad():
            for parameter in layer.w_qkv.parameters():
                parameter.copy_(parameter[order])
        layer.n_heads, layer.n_kv_heads = layer.n_heads // mesh.size(), layer.n_kv_heads // mesh.size()
    plan = {name: style() for name, module in model.named_modules()
            for pattern, style in TENSOR_PARALLEL.items()
            if fnmatchcase(name, pattern) and not isinstance(module, nn.Identity)}
    parallelize_module(model, mesh, plan)
    if tied:
        model.lm_head.weight = model.token_embedding.weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
