"""Compiles a pipelined training step for cards that are not here, and says what it needs and sends.

    make gpu-compiler
    python tools/plan_pipeline.py                      # ResNet-50 on 16 H100, two hosts of 8
    python tools/plan_pipeline.py --cpu --model resnet8 --image 32 --batch 32 --microbatches 4
    python tools/plan_pipeline.py --markdown           # writes the tables into docs/gpu_evidence.md

The step is the trainer's own (momentum, loss, metrics, the norm of the gradient), compiled from shapes: no
array is made. Memory is the compiler's plan for one device; what cuDNN takes for its work comes on top. What
is sent is compared with its closed form; a difference ends the tool with an error, unless it is that XLA
sends once what a stage sends twice out of the same operands.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cards

if TYPE_CHECKING:
    from shardtrain.plan.pipelined import Copies, Memory, Traffic
    from shardtrain.train.pipelined.step import Pipelined

MODELS = {"resnet50": 50, "resnet34": 34, "resnet18": 18, "resnet8": 8}
MIB, GIGA = 2.0**20, 1e9


def step(args: argparse.Namespace) -> tuple["Pipelined", Any]:
    """The stages and the compiled step."""
    if args.cpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        cards.prepare()

    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import shardtrain as st
    from shardtrain.mesh import parse

    try:
        sizes = parse(args.mesh)
        if sizes.get("pipe", 1) == 1:
            sys.exit(f"error: --mesh {args.mesh} has no pipe; plan.compiled_step compiles such a step")
        total = math.prod(sizes.values())
        if min(sizes.values()) < 1:
            sys.exit(f"error: --mesh {args.mesh}: no device is here to count; use sizes of 1 or more")
        if args.cpu:
            jax.config.update("jax_num_cpu_devices", total)
            devices: Any = jax.devices()
        elif total % args.hosts:
            sys.exit(f"error: {total} cards on {args.hosts} hosts; use as many on each")
        else:
            devices = cards.devices(cards.CARDS[args.target], hosts=args.hosts, per_host=total // args.hosts)
        mesh = st.make_mesh(args.mesh, devices=devices)
        model = nnx.eval_shape(
            lambda: st.models.ResNet(MODELS[args.model], args.classes, 3, rngs=nnx.Rngs(0))
        )
        trainer = st.Trainer(
            model,
            optax.sgd(0.1, momentum=0.9),
            mesh=mesh,
            accumulate=args.microbatches,
            pipeline=st.Pipeline(schedule=args.schedule, overlap=args.overlap),
            dtype=args.dtype,
        )
        images = jax.ShapeDtypeStruct((args.batch, args.image, args.image, 3), jnp.float32)
        compiled = trainer.prepare(images, jax.ShapeDtypeStruct((args.batch,), jnp.int32))
    except st.UserError as error:
        sys.exit(f"error: {error}")
    assert trainer.pipeline is not None
    return trainer.pipeline, compiled


Lines = list[tuple[str, ...]]


def stage_rows(pipeline: "Pipelined") -> Lines:
    """The stages: operations and bytes are those of one device."""
    from shardtrain.pipeline.cut.operation_costs import flops

    def giga(body: Any) -> str:
        return f"{sum(map(flops, body.jaxpr.eqns)) / GIGA:.3g}"

    def mib(shapes: Any) -> str:
        return f"{sum(s.dtype.itemsize * s.size for s in shapes) / MIB:.4g}"

    named = pipeline.layers.names_of_stages(pipeline.starts)
    head = "stage", "rank", "layers", "GFLOP F", "I", "W", "weights MiB", "kept MiB", "in flight", "sends MiB"
    rows: Lines = [head]
    params = pipeline.packing.arrays["params"]
    for k, p in enumerate(pipeline.programs):
        places = [params.places[i] for i in params.at_stage[k]]
        rows.append(
            (
                str(k),
                str(pipeline.schedule.ranks_of[k]),
                ", ".join(named[k]),
                *map(giga, (p.forward, p.input_gradient, p.weight_gradient)),
                mib(places),
                mib((*p.saved, *p.lasting)),
                str(pipeline.ticks.peak_of_stage[k]),
                mib(p.outs) if k < len(pipeline.programs) - 1 else "",
            )
        )
    return rows


def traffic_rows(found: list["Traffic"]) -> Lines:
    """What is sent, next to its closed form."""
    rows: Lines = [("what", "collective", "axes", "count", "payload MiB", "closed form")]
    for t in found:
        closed_form = "" if t.expected is None else f"{t.expected / MIB:.4g}"
        if t.payload == t.expected:
            closed_form = "equal"
        elif t.payload == t.merged:
            closed_form += ", twice the same merged"
        rows.append((t.what, t.kind, ",".join(t.axes), str(t.count), f"{t.payload / MIB:.4g}", closed_form))
    return rows


def sentences(pipeline: "Pipelined", need: "Memory", copied: "Copies", seconds: float) -> list[str]:
    """The figures that are no table."""
    from shardtrain.pipeline import classical
    from shardtrain.pipeline.schedules.show import percent
    from shardtrain.plan.pipelined import sends, ticks

    sent, counted = sends(pipeline)
    idle = percent(classical(pipeline.schedule, pipeline.costs).idle), percent(pipeline.ticks.idle)
    of, trips = pipeline.schedule, ticks(pipeline)
    return [
        f"{of.name}: {of.ranks} ranks, {of.stages} stages, {of.microbatches} microbatches, {trips} ticks",
        f"idle by counted costs: {idle[0]} if each rank waits only for what it needs, {idle[1]} in lockstep",
        f"one device: arguments {need.arguments / MIB:,.0f} MiB, temporary {need.temporary / MIB:,.0f} MiB"
        + (f", peak {need.peak / MIB:,.0f} MiB" if need.peak > need.temporary else ""),
        f"a tick copies {(copied.loop + copied.branch) / MIB:,.0f} MiB without computing; the loop carries "
        f"{copied.carried / MIB:,.0f} MiB",
        f"messages go along a route {sent} times; the census counts {counted}, one at every tick",
        "no collective waits for devices that do not come",
        f"compiled in {seconds:.0f} s",
    ]


def arguments() -> argparse.Namespace:
    """Parses the command line, and refuses what cannot be right before anything is compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="resnet50")
    parser.add_argument("--image", type=int, default=224, help="rows and columns")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256, help="examples in a step")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--mesh", default="pipe=4,data=2,height=2")
    parser.add_argument(
        "--schedule", default="1f1b", help="a name of shardtrain.pipeline.NAMES or a .csv file"
    )
    parser.add_argument("--overlap", action="store_true", help="messages travel while the next tick computes")
    parser.add_argument("--dtype", default="bfloat16", help="to compute in; XLA on CPUs sends it as float32")
    parser.add_argument("--target", choices=list(cards.CARDS), default="sm_90a")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="compile for simulated devices instead")
    parser.add_argument("--hlo", type=Path, metavar="FILE", help="write the compiled program here")
    parser.add_argument("--markdown", action="store_true", help="write the tables into docs/gpu_evidence.md")
    args = parser.parse_args()
    if args.hlo and (args.hlo.is_dir() or not args.hlo.parent.is_dir()):
        parser.error(f"--hlo {args.hlo}: it is a folder, or there is no folder {args.hlo.parent}")
    if args.hosts < 1:
        parser.error(f"--hosts {args.hosts}: use 1 or more")
    return args


def show(title: str, tables: Sequence[Lines], notes: Sequence[str]) -> None:
    """Prints the tables and sentences in the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100 if not sys.stdout.isatty() else None)
    console.print(title, style="bold")
    for rows in tables:
        table = Table(padding=(0, 0, 0, 0))
        for name in rows[0]:
            table.add_column(
                name, justify="left" if name in ("layers", "what", "collective", "axes") else "right"
            )
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def write_document(title: str, tables: Sequence[Lines], notes: Sequence[str]) -> None:
    """Writes the tables and sentences into docs/gpu_evidence.md."""
    import jax
    from census_conv import DOCUMENT, write_between

    parts = [f"{title}; jax {jax.__version__}."]
    for header, *rows in tables:
        parts += ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        parts += ["| " + " | ".join(row) + " |" for row in rows]
    parts += ["", *(f"- {note}" for note in notes)]
    write_between("plan_pipeline", "\n".join(parts), DOCUMENT.with_name("gpu_evidence.md"))


def main() -> None:
    """Compiles the step, prints and writes its tables, and fails where they differ from the closed forms."""
    args = arguments()
    begin = time.perf_counter()
    pipeline, compiled = step(args)
    seconds = time.perf_counter() - begin

    from shardtrain.plan.pipelined import copies, memory, traffic

    text = compiled.as_text()
    if args.hlo:
        args.hlo.write_text(text)
    found = traffic(pipeline, text)
    where = "simulated CPU devices" if args.cpu else f"{args.target}, {args.hosts} host(s)"
    what = f"{args.model}, {args.batch} images of {args.image} x {args.image}, {args.dtype}"
    title = f"{what}: {args.mesh} on {where}"
    notes = sentences(pipeline, memory(compiled), copies(text), seconds)
    tables = stage_rows(pipeline), traffic_rows(found)
    show(title, tables, notes)
    if args.markdown:
        write_document(title, tables, notes)
    wrong = [t for t in found if not t.right]
    if wrong and not (args.cpu and args.dtype == "bfloat16"):
        sys.exit(
            "error: not what was expected: "
            + ", ".join(f"{t.what} {t.kind} {','.join(t.axes)}" for t in wrong)
        )


if __name__ == "__main__":
    main()
