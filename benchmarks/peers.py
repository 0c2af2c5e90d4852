"""Other implementations of the same shape, on the same machine and tokens.

Needs requirements-peers.txt. Every peer runs in a separate process: torch's threads spin for a
while after every operation, and would slow down the implementation that is timed next.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from modse_jax.config.options import Config
from modse_jax.runtime import malloc

# Implementations of the experts in transformers; "compiled" is grouped_mm under torch.compile.
IMPLEMENTATIONS = ("grouped_mm", "eager", "compiled")

# The same with the GLIBC_TUNABLES of train.py; the others run as installed.
TUNED = ("grouped_mm, large pages", "compiled, large pages")


class Peer:
    """A training step in another process.

    Attributes:
        versions: versions of the packages there, and the number of threads.
    """

    def __init__(self, task: dict[str, Any], use_large_pages: bool):
        environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        if use_large_pages:
            environment["GLIBC_TUNABLES"] = malloc.LARGE_PAGES
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", json.dumps(task)],
            text=True,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.versions = self._read_answer()

    def __call__(self) -> float:
        """Runs one step and returns its loss."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read_answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _read_answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the process of a peer has ended; its own output above has the reason")
        return json.loads(line)


def check_installed() -> None:
    """Exits with a message if a package of the peers is missing."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            sys.exit(f"--peers needs {package}: pip install -r requirements-peers.txt")


def start_mixtrals(config: Config) -> dict[str, Peer]:
    """Starts training steps of Hugging Face's Mixtral with AdamW in float32.

    Returns:
        The peers by name, one for each implementation of the experts.
    """
    model = config.model
    shape = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=config.moe.width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads or model.num_heads,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        router_aux_loss_coef=config.moe.balance_loss_weight,
    )
    task = dict(
        batch=config.training.batch_size,
        length=config.data.sequence_length,
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        grad_clip=config.optimizer.grad_clip,
    )
    started = {}
    for name in (*IMPLEMENTATIONS, *TUNED):
        experts = name.split(",")[0]
        own_task = {**task, "shape": shape, "experts": experts}
        started[f"mixtral {name}"] = Peer(own_task, name in TUNED)
    return started


def _serve(task: dict[str, Any]) -> None:
    """Prints the versions, then runs a step and prints its loss for every line of input."""
    step = _build_step(task)
    step()
    print(json.dumps(_list_versions()), flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


def _list_versions() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def _build_step(task: dict[str, Any]) -> Callable[[], float]:
    import torch
    import transformers

    torch.manual_seed(0)
    compiled = task["experts"] == "compiled"
    shape = transformers.MixtralConfig(output_router_logits=True, use_cache=False, **task["shape"])
    model = transformers.MixtralForCausalLM(shape)
    model.set_experts_implementation("grouped_mm" if compiled else task["experts"])
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=task["learning_rate"], weight_decay=task["weight_decay"]
    )
    all_tokens = torch.randint(4, shape.vocab_size, (task["batch"], task["length"] + 1))
    tokens = all_tokens[:, :-1].contiguous()
    targets = all_tokens[:, 1:].reshape(-1)
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        out = forward(input_ids=tokens)
        logits = out.logits.reshape(-1, shape.vocab_size)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss = loss + out.aux_loss * shape.router_aux_loss_coef
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
