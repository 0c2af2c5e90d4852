"""The same shape in other people's code, on the same machine and tokens. Needs requirements-peers.txt.

A peer lives in a process of its own: torch's threads spin for a while after every operation, and would take the cores
from whoever runs next.
"""

import importlib.util
import json
import os
import subprocess
import sys

from modse_jax.config.options import Config
from modse_jax.runtime import malloc

IMPLEMENTATIONS = (
    "grouped_mm",
    "eager",
    "compiled",
)  # of the experts; the last is grouped_mm under torch.compile


TUNED = (
    "grouped_mm, large pages",
    "compiled, large pages",
)  # GLIBC_TUNABLES as our scripts'; others as installed


def check_installed() -> None:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            sys.exit(f"--peers needs {package}: pip install -r requirements-peers.txt")


def mixtral(config: Config) -> dict:
    """{name: a training step} of Hugging Face's Mixtral with AdamW, fp32."""
    m, o = config.model, config.optimizer
    shape = dict(
        vocab_size=m.vocab_size,
        hidden_size=m.dim,
        intermediate_size=config.moe.width,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_kv_heads or m.num_heads,
        num_local_experts=config.moe.num_experts,
        num_experts_per_tok=config.moe.top_k,
        router_aux_loss_coef=config.moe.balance_loss_weight,
    )
    rows = dict(
        batch=config.training.batch_size,
        length=config.data.sequence_length,
        learning_rate=o.learning_rate,
        weight_decay=o.weight_decay,
        grad_clip=o.grad_clip,
    )
    return {
        f"mixtral {name}": _Peer(
            {**rows, "shape": shape, "experts": name.split(",")[0]}, name in TUNED
        )
        for name in (*IMPLEMENTATIONS, *TUNED)
    }


class _Peer:
    """A step in another process, which waits for a line between steps. versions: what runs there."""

    def __init__(self, task, large_pages):
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        if large_pages:
            environment["GLIBC_TUNABLES"] = malloc.LARGE_PAGES
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", json.dumps(task)],
            text=True,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.versions = self._answer()

    def close(self):
        self._process.stdin.close()
        self._process.wait()

    def __call__(self):
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a peer's process has ended; its own output says why")
        return json.loads(line)


def _serve(task):
    step = _step(task)
    step()
    print(json.dumps(_versions()), flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


def _versions():
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def _step(task):
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
    tokens, targets = all_tokens[:, :-1].contiguous(), all_tokens[:, 1:].reshape(-1)
    forward = torch.compile(model) if compiled else model

    def step():
        out = forward(input_ids=tokens)
        loss = torch.nn.functional.cross_entropy(out.logits.reshape(-1, shape.vocab_size), targets)
        loss = loss + out.aux_loss * shape.router_aux_loss_coef
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
