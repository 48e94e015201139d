"""What fast paths give on a GPU: kernels against their twins, products of codes, and steps of a Llama in ratios.

    python tests/benchmarks/gpu.py [--layers 16] [--seconds 280] [--out gpu.json]

Needs torch and triton alone. Rounds are interleaved, so that drift cancels; ratios are medians over rounds.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/numerics/kernels")]

from qlightning.layers.backward import Backward  # noqa: E402
from qlightning.layers.convert import convert  # noqa: E402
from qlightning.layers.on_codes import OnCodes  # noqa: E402
from qlightning.layers.scheme import Scheme  # noqa: E402
from qlightning.numerics import Quantizer, parse  # noqa: E402
from qlightning.numerics.code_product import Coded, product_of_codes  # noqa: E402
from qlightning.numerics.compiled import divide_exactly  # noqa: E402
from qlightning.numerics.kernels.switch import use_kernels  # noqa: E402

START = time.time()
INT8 = {"grad_dgrad": "int8-token", "weight_dgrad": "int8-channel", "grad_wgrad": "int8-channel"}
SCHEMES: dict[str, Any] = {
    "plain": None,
    "W8A8 int8 codes": Scheme("int8-channel", input="int8-token", product="codes"),
    "W8A8 fp8 codes": Scheme("fp8e4m3-channel", input="fp8e4m3-token", product="codes"),
    "int4-g128": "int4-g128",
    "W8A8 int8 codes in all three": Scheme(
        "int8-channel",
        input="int8-token",
        backward=Backward(**INT8, input_wgrad="int8-channel"),
        product=OnCodes(["fprop", "dgrad", "wgrad"]),
    ),
    "W8A8 int8 decoded": Scheme("int8-channel", input="int8-token"),
}


class Block(nn.Module):
    """A Llama block: grouped-query attention with rotary embedding, SwiGLU."""

    def __init__(self, width: int, inner: int, heads: int, shared: int) -> None:
        super().__init__()
        self.size, self.heads, self.shared = width // heads, heads, shared
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, shared * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (t * cos + torch.cat([-t[..., self.size // 2 :], t[..., : self.size // 2]], -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """1B-shaped by default in width; as many blocks as asked for."""

    def __init__(self, layers: int, *, width: int, inner: int, heads: int, shared: int, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, inner, heads, shared) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words, bias=False)
        self.size = width // heads

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        where = torch.arange(ids.shape[1], device=ids.device)[:, None]
        angle = where * 1e4 ** -torch.linspace(0, 1, self.size // 2 + 1, device=ids.device)[:-1].repeat(2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def say(*words: Any) -> None:
    print(f"[{time.time() - START:6.1f}s]", *words, flush=True)


def timed(call: Callable[[], Any], device: str, times: int = 1) -> float:
    """Seconds per call."""
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # keeps the device busy while the host gets ahead, as in training
        first.record()
        for _ in range(times):
            call()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / times
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def kernels(device: str) -> dict[str, str]:
    """What each kernel's check said."""
    import checks

    said: dict[str, str] = {}
    for check in checks.all_checks(device):
        try:
            check(device)
            said[check.__name__] = "equal"
        except Exception as error:
            said[check.__name__] = f"{type(error).__name__}: {error}"
        say("kernel", check.__name__, said[check.__name__][:600])
    return said


def products(device: str) -> dict[str, Any]:
    """Exactness and speed of products of codes beside bfloat16."""
    found: dict[str, Any] = {}
    for m, n, k in [(100, 72, 136), (8192, 2048, 2048), (8192, 8192, 2048), (8192, 2048, 8192)]:
        generator = torch.Generator(device).manual_seed(0)
        a, b = (
            torch.randint(-128, 128, (rows, k), generator=generator, device=device).to(torch.int8) for rows in (m, n)
        )
        scales = [torch.rand(rows, 1, generator=generator, device=device) * 0.01 for rows in (m, n)]
        coded = Coded(a, scales[0]), Coded(b, scales[1])
        float8 = tuple(Coded((c.codes.float() / 32).to(torch.float8_e4m3fn), c.scale) for c in coded)
        x, w = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
        row: dict[str, Any] = {}
        use_kernels(False)
        y = product_of_codes(*coded, None, torch.bfloat16)
        use_kernels(True)
        row["kernel equals _int_mm"] = torch.equal(y, product_of_codes(*coded, None, torch.bfloat16))
        exact = (float8[0].codes.double() @ float8[1].codes.double().t()) * scales[0].double() * scales[1].double().t()
        sums = (float8[0].codes.double().abs() @ float8[1].codes.double().abs().t()) * scales[0] * scales[1].t()
        error = (product_of_codes(*float8, None, torch.bfloat16).double() - exact).abs() - 2.0**-8 * exact.abs()
        row["fp8: error beyond bf16, over sum |a||b|"] = float((error / sums).max())
        if m > 1000:
            calls: dict[str, Callable[[], Any]] = {
                "bf16": lambda x=x, w=w: F.linear(x, w),
                "int8": lambda c=coded: product_of_codes(*c, None, torch.bfloat16),
                "fp8": lambda c=float8: product_of_codes(*c, None, torch.bfloat16),
            }
            for call in calls.values():
                timed(call, device, 3)
            rounds = {name: min(timed(call, device, 10) for _ in range(5)) for name, call in calls.items()}
            row |= {f"{name} TFLOP/s": round(2e-12 * m * n * k / seconds, 1) for name, seconds in rounds.items()}
        found[f"{m} x {n} x {k}"] = row
        say("product", m, n, k, row)
    return found


def _values_and_codes(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    return quantizer.values_and_codes(x, quantizer.grid(x), None)


def compiled(device: str) -> dict[str, int]:
    """How many of four million values are others under torch.compile than in eager mode."""
    found: dict[str, int] = {}
    for spec in ["int4-g128", "int8-token", "fp8e4m3-token", "fp8e5m2-token", "nvfp4"]:
        for dtype in (torch.bfloat16, torch.float32):
            quantizer = parse(spec)
            x = torch.randn(2048, 2048, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
            eager = functools.partial(_values_and_codes, quantizer)
            pairs = zip(eager(x), torch.compile(eager)(x), strict=True)
            found[f"{spec} {dtype}"] = sum(int((one != other).sum()) for one, other in pairs)
    say("other values when compiled:", found)
    return found


def steps(device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time of a training step beside plain training, interleaved."""
    shape = {"width": 2048, "inner": 8192, "heads": 32, "shared": 8, "words": 32000}
    if device == "cpu":
        shape = {"width": 128, "inner": 256, "heads": 4, "shared": 2, "words": 100}
    batch, length = (4, 2048) if device == "cuda" else (1, 32)
    ids = torch.randint(shape["words"], (batch, length), device=device)
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, scheme in SCHEMES.items():
        if arguments.only and name not in arguments.only.split(","):
            continue
        if calls and time.time() - START > arguments.seconds * 0.8:
            say("no time left for", name)
            break
        torch.manual_seed(0)
        model = Llama(arguments.layers, **shape).to(device, torch.bfloat16)
        if scheme is not None:
            convert(model, {"blocks.*": scheme})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
        options = {"triton.multi_kernel": int(arguments.multi_kernel), "triton.cudagraphs": arguments.cudagraphs}
        for part in () if arguments.eager else (model,) if arguments.whole else model.blocks:
            part.compile(fullgraph=True, options=options)

        def call(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            loss = model(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        try:
            losses = [float(call().detach()) for _ in range(3)]
        except Exception as error:
            say("step", name, f"failed: {type(error).__name__}: {error}"[:3000])
            continue
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            say("peak over the state", name, f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB")
        if device == "cuda":
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            say("until the host has launched a step of", name, f"{(time.perf_counter() - start) * 1e3:.1f} ms")
        calls[name] = call
        frames = torch._dynamo.utils.counters["frames"].get("ok", 0)
        say("step", name, "losses", [round(loss, 4) for loss in losses], "frames compiled so far", frames)
    if arguments.profile:
        for name, call in calls.items():
            profile(name, call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody is always behind the same one
            times[name].append(timed(calls[name], device, 2))
    found = {}
    for name, seconds in times.items():
        ratios = sorted(own / plain for own, plain in zip(seconds, times["plain"], strict=True))
        found[name] = {"ms": statistics.median(seconds) * 1e3, "ratio": statistics.median(ratios), "ratios": ratios}
        shown = ", ".join(f"{ratios[len(ratios) * i // 4 - (i == 4)]:.3f}" for i in range(5))
        say(f"{name}: {found[name]['ms']:.1f} ms, ratio {found[name]['ratio']:.3f} (quartiles {shown})")
    return found


def profile(name: str, call: Callable[[], Any], steps: int = 2) -> None:
    """Says where the time of a step goes: how long kernels run, the slowest of them, and what the host adds."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA]) as profiler:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    first, last = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    total: dict[str, list[float]] = {}
    for event in events:
        total.setdefault(event.name, []).append(event.time_range.elapsed_us())
    busy = sum(sum(times) for times in total.values())
    say(f"profile {name}: {(last - first) / 1e3 / steps:.2f} ms a step, kernels {busy / 1e3 / steps:.2f} ms")
    for kernel, times in sorted(total.items(), key=lambda item: -sum(item[1]))[:32]:
        print(f"  {sum(times) / 1e3 / steps:8.3f} ms {len(times) // steps:5d} x  {kernel[:150]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--whole", action="store_true", help="compile the model at once and not block by block")
    parser.add_argument("--multi-kernel", action="store_true", help="inductor's triton.multi_kernel, for all")
    parser.add_argument("--cudagraphs", action="store_true", help="as mode='reduce-overhead'")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", default="", help="kernels, products, compiled")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.config.cache_size_limit = 64
    divide_exactly()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    say(name, "torch", torch.__version__)
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "options": vars(arguments)}
    results |= {"date": time.strftime("%Y-%m-%d"), "commit": os.environ.get("COMMIT", "")}
    if "kernels" not in arguments.skip and device == "cuda":
        results["kernels"] = kernels(device)
    if "products" not in arguments.skip and device == "cuda":
        results["products"] = products(device)
    if "compiled" not in arguments.skip and device == "cuda":
        results["compiled"] = compiled(device)
    results["steps"] = steps(device, arguments)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
