"""Chapter 6 against its peers: a step of LoRA on SmolLM2's weights, and what it takes of memory.

The peer is ``peft`` on ``transformers``, called as its documentation does: labels of -100 on what does not count.
"""

import torch

from ch04_gpt.gpt import GPT, PRESETS
from ch06_finetune.finetune import add_lora, answer_loss
from tests.bench_limits import limit
from tests.bench_peers import smollm2, transformers_smollm2
from utils.bench import COURSE, Aim, Row

BATCH, ANSWER, RANK, ALPHA = 4, 32, 8, 16
PEFT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(quick: bool = False) -> list[Row]:
    """What ``course.py bench finetune`` measures; with ``quick``, one step on short texts."""
    steps, length = (1, 40) if quick else (3, 128)
    tokens = steps * BATCH * length
    return [Row(f"LoRA step on SmolLM2, {BATCH} x {length} tokens, {ANSWER} of each count, rank {RANK} on all "
                "matrices, float32", __name__,
                {COURSE: "lora_ours", "peft + transformers": "lora_peft"}, (steps, length), tokens, "tokens",
                [Aim("times", 1.3)],
                {"matrix products alone, float32": limit("multiply_float32", least_flops(steps, length))})]


def batch(vocab_size: int, length: int):
    """Token ids (B, length + 1), and a mask that is true on the last ``ANSWER``."""
    ids = torch.randint(vocab_size, (BATCH, length + 1), generator=torch.Generator().manual_seed(0))
    return ids, (torch.arange(length + 1) > length - ANSWER).expand(BATCH, -1)


def train(model, loss_of, steps):
    """Forward, loss, backward, clipping and AdamW on what is not frozen: everybody with PyTorch's own, fused."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()

    def run():
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss_of().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    return run


def lora_ours(argument):
    """The course's GPT with its own LoRA."""
    steps, length = argument
    model = smollm2()
    add_lora(model, RANK, ALPHA)
    ids, mask = batch(model.config.vocab_size, length)
    return train(model, lambda: answer_loss(model, ids, mask), steps)


def lora_peft(argument):
    """The same weights from a folder in the library's layout; queries, keys and values are three matrices there."""
    from peft import LoraConfig, get_peft_model  # only where it is needed: it takes seconds to import

    steps, length = argument
    model = transformers_smollm2()
    ids, mask = batch(model.config.vocab_size, length)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PEFT_TARGETS, lora_dropout=0.0,
                                             task_type="CAUSAL_LM"))
    targets = ids.masked_fill(~mask, -100)[:, 1:].contiguous()
    return train(model, lambda: model(input_ids=ids[:, :-1], labels=targets, shift_labels=targets,
                                      use_cache=False).loss, steps)


def least_flops(steps: int, length: int) -> float:
    """The multiplications that a step cannot do without: forward, and back to the states."""
    with torch.device("meta"):
        model = GPT(PRESETS["smollm2-135m"])
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    return steps * BATCH * 4 * (blocks * length + model.lm_head.weight.numel() * ANSWER)
