"""Recovery fine-tuning of a sliced network with LoRA, merged afterwards: for scale only.

SliceGPT's setting: rank 32, alpha 10, sequences of 1024 tokens (section 4 there).
"""

import re
import time
import warnings
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from dynslice.core.errors import RequestError
from dynslice.core.tensors import check_finite, check_tokens, synchronise
from dynslice.method.architectures import family_of

LOOK = 10  # steps between two looks at the loss


@dataclass(frozen=True)
class FineTuning:
    """How a network is fine-tuned: steps of one window each, over the windows again and again.

    Raises RequestError for numbers that make no training.
    """

    steps: int
    rank: int = 32
    alpha: int = 10
    learning_rate: float = 3e-4
    warm_up: float = 0.1  # of the steps, then the rate falls to zero
    dropout: float = 0.0

    def __post_init__(self):
        sound = self.steps >= 1 and self.rank >= 1 and self.alpha > 0 and self.learning_rate > 0
        if not (sound and 0 <= self.warm_up <= 1 and 0 <= self.dropout < 1):
            raise RequestError(f"{self} makes no training; give positive numbers")


def finetune(
    model: PreTrainedModel, windows: Tensor, recovery: FineTuning, seed: int = 0
) -> tuple[PreTrainedModel, float]:
    """Fine-tune a sliced model in place on windows [n, T]; the merged model, and the seconds.

    The loss is the mean NLL of each window. The order of windows and the first adapters are sampled
    by `seed`. Raises RequestError for tokens outside the vocabulary and a loss that is not finite.
    """
    check_tokens(model.config, windows)
    start = time.perf_counter()
    family = family_of(model.config)
    names = {name for block in family.blocks for name in (*block.reads, *block.writes)}
    in_layer = "|".join(map(re.escape, sorted(names)))
    config = LoraConfig(
        r=recovery.rank,
        lora_alpha=recovery.alpha,
        lora_dropout=recovery.dropout,
        target_modules=rf"{re.escape(family.layers)}\.\d+\.({in_layer})",
    )
    gpus = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # peft asks transformers for a name that is on its way out
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, config).train()
        rounds = [torch.randperm(len(windows)) for _ in range(-(-recovery.steps // len(windows)))]
        order = torch.cat(rounds).tolist()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recovery.learning_rate, weight_decay=0.0)
        warm_up = round(recovery.warm_up * recovery.steps)
        schedule = get_linear_schedule_with_warmup(optimizer, warm_up, recovery.steps)
        order, losses = order[: recovery.steps], []
        steps = tqdm(order, desc="recovery", unit="step", leave=False)
        for done, i in enumerate(steps, start=1):
            ids = windows[i : i + 1].to(model.device)
            loss = adapted(ids, labels=ids, use_cache=False).loss
            losses.append(loss.detach())
            loss.backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if done % LOOK == 0 or done == len(order):  # now and then: a GPU waits for it
                check_finite(torch.stack(losses), "the loss of recovery", model.dtype)
                steps.set_postfix(nll=f"{losses[-1].item():.3f}")
                losses.clear()
    merged = adapted.merge_and_unload().eval().requires_grad_(False)
    synchronise(model.device)
    return merged, time.perf_counter() - start
