"""Run every operator and each model family's smallest variant, on our path and on the naive unfold path.

The models see a real photograph, with random weights: what they compute is checked and timed, not what it means.
Operators run at the shapes RedNet-50, OverLoCK-T and VOLO-D1 give them. On every line both paths must agree before
either is timed; a line that disagrees or fails is reported, and the exit code is 1.

``--operator``, ``--model`` and ``--module`` run what they name instead, at a shape of one's own:

    python -m autotune profile --operator involution2d --shape 8x64x56x56 --kernel-size 7 --dtype bf16 --backward
    python -m autotune profile --model overlock_t --size 320x256 --batch 8
    python -m autotune profile --module mypackage.nets:Net --input 8x3x224x224

Prints a table and writes profile.json and plots (PNG). With ``--against`` it also says what became faster or slower
than an earlier profile.json, and the exit code is 1 where anything became slower.

Exit code: 0 all lines agree and are timed, 1 a line failed, became slower or could not be written, 2 bad arguments, 4
the GPU was lost, 130 interrupted; what was done by then is kept.
"""

import argparse
import copy
import functools
import json
import pkgutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kernels
from autotune import networks, plots, report, selection, timing, workloads
from autotune.cases import Case, run_cases, written
from autotune.measure import Settings, other_work
from autotune.networks import measure_model
from autotune.operators import operator_cases
from autotune.passes import PASSES
from autotune.workloads import Size, Workload
from kernels.backend import BACKENDS, interpreting, resolve
from kernels.files import write_json
from models.commands.arguments import make_folder
from models.commands.dispatch import input_errors
from models.commands.images import check_image
from models.commands.progress import console as messages
from models.commands.types import Number, device, dtype, image_size, positive
from models.registry import entry_point, families


def shape(text: str) -> tuple[int, ...]:
    """Sizes with an x between them, as in 8x64x56x56."""
    return tuple(int(positive(size)) for size in text.lower().split("x"))


def module(text: str) -> nn.Module:
    """PACKAGE.MODULE:NAME, the working directory's included: a module, or what makes one without arguments."""
    if not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"must be PACKAGE.MODULE:NAME, as in mypackage.nets:Net, got {text!r}")
    if "" not in sys.path:  # that of an installed command
        sys.path.insert(0, "")
    try:
        found: Any = pkgutil.resolve_name(text)
        found = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # of the user's code, which may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be imported and made without arguments: {reason}") from None
    if not isinstance(found, nn.Module):
        raise argparse.ArgumentTypeError(f"must name a torch.nn.Module, {text!r} gives {type(found).__name__}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where it runs").add_argument
    where("--device", type=device, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    text = "our path; auto is Triton on a GPU, eager elsewhere (default: %(default)s)"
    where("--backend", choices=BACKENDS, default=kernels.get_backend(), help=text)
    what = parser.add_argument_group("what it runs (default: all operators, each family's smallest model)").add_argument
    several: dict[str, Any] = {"nargs": "+", "default": []}
    text = "operators at the models' shapes or --shape, by the first word or a part of their name, or with * and ?"
    what("--operator", metavar="PATTERN", help=text, **several)
    what("--shape", type=shape, metavar="BxCxHxW", help="of --operator's map, as in: 8x64x56x56")
    what("--kernel-size", type=positive, metavar="K", help="of --operator at --shape (default: 7)")
    what("--model", metavar="NAME", help="models, as models list names them", **several)
    what("--module", type=module, metavar="MODULE:NAME", help="your own, as in: mypackage.nets:Net")
    what("--input", type=shape, metavar="BxCxHxW", help="of --module (default: from --batch and --size)")
    what("--image", type=Path, metavar="FILE", help="the photograph that models see (default: matplotlib's)")
    sizes: dict[str, Any] = {"dest": "sizes", "nargs": "+", "default": [(224, 224), (320, 256)]}
    what("--size", "--sizes", type=image_size, metavar="HxW", help="of the image (default: 224 320x256)", **sizes)
    what("--batch", type=positive, metavar="B", help="(default: 4; on a GPU 128, or 16 if it has less than 40 GB)")
    what("--dtype", type=dtype, metavar="TYPE", help="fp32, fp16 or bf16 (default: fp32; on a GPU bf16)")
    text = "forward and backward as well, as all operators are where none is named"
    what("--training", "--backward", dest="training", action="store_true", help=text)
    what("--quick", action="store_true", help="smoke test: batch 1, forward only, one size, two runs each")
    leaves = parser.add_argument_group("what it leaves").add_argument
    text = "(default: notebooks/results/DEVICE; build/results/DEVICE for a part, which must not replace the whole)"
    leaves("--out", type=Path, metavar="DIR", help=text)
    text = "an earlier profile.json: say what became faster or slower; the exit code is 1 if anything became slower"
    leaves("--against", type=Path, metavar="RESULTS.json", help=text)
    text = "share of a time from which a change counts (default: %(default)s)"
    leaves("--threshold", type=Number(above=0), default=0.1, metavar="X", help=text)
    leaves("--json", action="store_true", help="print what profile.json holds instead of the table")


def _ours_and_naive(found: dict[str, Any]) -> dict[str, Any]:
    """A row of profile.json: the two paths side by side. RuntimeError where the naive one could not be timed."""
    if "naive" in found["left_out"]:
        raise RuntimeError(f"the naive path: {found['left_out']['naive']}")
    paths, ratio = found.pop("contenders"), found.pop("speed_up")["naive"]
    images = [times.pop("images_per_second", None) for times in paths.values()]
    kept = {name: found[name] for name in ("relative_error", "tolerance", "floor") if name in found}
    return {**kept, **paths, "speed_up": ratio} | ({"images_per_second": images[0]} if images[0] else {})


def _names_something(arguments: argparse.Namespace) -> bool:
    """Else all operators and each family's smallest model run."""
    return bool(arguments.operator or arguments.model or arguments.module is not None)


def _model_cases(
    arguments: argparse.Namespace, settings: Settings, batch: int, sizes: Sequence[Size], passes: Sequence[str]
) -> Iterator[Case]:
    """Models on the photograph at every size, and a module of the user's on random inputs."""
    smallest = {variants[0].__name__: variants[0].title for variants in families().values()}
    chosen = {name: name for name in arguments.model} if _names_something(arguments) else smallest

    def family(name: str, size: Size, training: bool) -> dict[str, Any]:
        photo = networks.photograph(arguments.image)
        seen = networks.image_batch(photo, (224, 224), 1, torch.float32, torch.device("cpu"))
        model = networks.settled_model(name, seen).to(settings.device)
        images = networks.image_batch(photo, size, batch, torch.float32, settings.device)
        return measure_model(model, images, settings, training=training)

    def own(shape: Sequence[int], training: bool) -> dict[str, Any]:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(settings.device)
        model = copy.deepcopy(arguments.module).to(settings.device).float()
        return measure_model(model, images, settings, training=training)

    measured = [(n, t, f"{s[0]}×{s[1]}", functools.partial(family, n, s)) for n, t in chosen.items() for s in sizes]
    if arguments.module is not None:
        title, shape = type(arguments.module).__name__, arguments.input or (batch, 3, *sizes[0])
        measured.append((title, title, "×".join(map(str, shape)), functools.partial(own, shape)))
    for name, title, shape, measure in measured:
        for kind in passes:
            facts = {"kind": "model", "name": f"{name} {shape}", "model": title, "shape": shape, "pass": kind}
            training = kind == PASSES[1]
            yield Case(facts, lambda measure=measure, training=training: _ours_and_naive(measure(training=training)))


def _cases(arguments: argparse.Namespace, settings: Settings, batch: int, sizes: Sequence[Size]) -> list[Case]:
    """Cases of what the command line names. ValueError, naming the option, for what does not exist or fit together."""
    named = _names_something(arguments)
    both = PASSES if arguments.training else PASSES[:1]
    cases: list[Case] = []
    if arguments.operator or not named:
        passes = both if named else PASSES[:1] if arguments.quick else PASSES
        cases += operator_cases(_workloads(arguments, batch), settings, passes, _ours_and_naive)
    for name in arguments.model:
        entry_point(name, "--model")
    return cases + list(_model_cases(arguments, settings, batch, sizes, both))


def _workloads(arguments: argparse.Namespace, batch: int) -> list[Workload]:
    """The operators at the models' own shapes, or those that --operator names at --shape."""
    if arguments.shape is None:
        found = workloads.operator_workloads(batch)
        return selection.named(found, arguments.operator) if arguments.operator else found
    _, channels, *size = arguments.shape
    shape: dict[str, Any] = {"batch": batch, "channels": channels, "size": tuple(size)}
    shape["kernel_size"] = arguments.kernel_size or 7
    names = selection.matching(list(workloads.OPERATORS), arguments.operator)
    try:
        return [workloads.workload_of(name, **shape) for name in names]
    except ValueError as error:
        raise ValueError(f"--shape and --kernel-size must suit the operator: {error}") from None


def _given_batch(arguments: argparse.Namespace) -> int | None:
    """--batch, or the first number of --shape or --input, which must be the same."""
    if arguments.shape is not None and (not arguments.operator or len(arguments.shape) != 4):
        raise ValueError("--shape must be BATCHxCHANNELSxHEIGHTxWIDTH, of an --operator")
    if arguments.kernel_size is not None and arguments.shape is None:
        raise ValueError("--kernel-size must come with --shape")
    if arguments.input is not None and arguments.module is None:
        raise ValueError("--input must come with --module")
    given = {"--batch": arguments.batch, "--shape": (arguments.shape or [None])[0]}
    given["--input"] = (arguments.input or [None])[0]
    found = {option: batch for option, batch in given.items() if batch is not None}
    if len(set(found.values())) > 1:
        texts = ", ".join(f"{option} {batch}" for option, batch in found.items())
        raise ValueError(f"--batch, --shape and --input must have the same batch, got {texts}")
    return next(iter(found.values()), None)


def _settings(arguments: argparse.Namespace) -> tuple[Settings, int]:
    """How everything is measured, and the batch."""
    chosen = arguments.device or timing.best_device()
    if resolve(arguments.backend, torch.empty(0, device=chosen)) == "triton" and interpreting():
        raise ValueError("TRITON_INTERPRET=1 runs kernels in Python, and timing that means nothing; unset it")
    on_gpu, quick = chosen.type == "cuda", arguments.quick
    batch = 4
    if on_gpu:
        batch = 128 if torch.cuda.get_device_properties(chosen).total_memory >= 40e9 else 16
    dtype = arguments.dtype or timing.usual_dtype(chosen)
    settings = Settings(chosen, dtype, arguments.backend, 0 if quick else 1.5, 2 if quick else 3)
    return settings, _given_batch(arguments) or (1 if quick else batch)


def _new_record(arguments: argparse.Namespace, settings: Settings, batch: int, sizes: Sequence[Size]) -> dict[str, Any]:
    image = arguments.image.name if arguments.image else "matplotlib's portrait of Grace Hopper"
    weights = "random"
    if arguments.module is not None:
        others = f"{image} (--module: random inputs)", f"{weights} (--module: the module's own)"
        image, weights = others if arguments.model else ("random inputs", "the module's own")
    stated = {"dtype": timing.precision(settings.dtype), "batch": batch, "backend": settings.backend}
    stated["implementation"] = resolve(settings.backend, torch.empty(0, device=settings.device))
    stated |= {"sizes": sizes, "image": image, "weights": weights}
    stated |= {"seconds_per_line": settings.seconds, "min_runs": settings.min_runs}
    record = {"schema": 1, "complete": False, "seconds": 0.0, "machine": timing.describe_machine(settings.device)}
    return record | {"settings": stated, "other_cores": None, "copy_gigabytes_per_second": None, "rows": []}


def run(arguments: argparse.Namespace) -> int:
    sizes = list(dict.fromkeys(arguments.sizes))[: 1 if arguments.quick else None]
    with input_errors():
        if arguments.image:
            check_image(arguments.image)
        settings, batch = _settings(arguments)
        cases = _cases(arguments, settings, batch, sizes)
        record, earlier = _new_record(arguments, settings, batch, sizes), {}
        if arguments.against is not None:
            earlier = report.earlier_rows(arguments.against, record, (case.name for case in cases))
        part = arguments.quick or arguments.against or _names_something(arguments)
        folder = arguments.out or timing.results_folder(settings.device, scratch=bool(part))
        make_folder(folder, "--out")

    path, start, others = folder / "profile.json", time.monotonic(), other_work()
    try:
        if any(case.facts["kind"] == "operator" for case in cases):
            speed = timing.copy_bandwidth(settings.device, seconds=settings.seconds)
            settings.ceilings["copy_bytes_per_second"], record["copy_gigabytes_per_second"] = speed, speed / 1e9
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 means float32, on both paths
            code = run_cases(cases, path, record)
    except KeyboardInterrupt:
        messages.print("[yellow]interrupted[/]; what was done by then is kept")
        code = 130
    record["seconds"], record["other_cores"] = round(time.monotonic() - start, 1), others()
    changes = report.differences(record["rows"], earlier, arguments.threshold)
    if arguments.against is not None:
        record["against"] = {"file": arguments.against.name, "threshold": arguments.threshold, "rows": changes}
    if arguments.json:
        print(json.dumps(record, indent=1))
    else:
        report.show(record)
        if arguments.against is not None:
            report.against_table(changes, str(arguments.against), arguments.threshold).show()
    on_disk = [written("the whole record", write_json, path, record)]
    for file, figure in report.figures(record).items():
        on_disk.append(written(file, plots.save, figure, folder / file, report.fingerprint(record)))
    if all(on_disk) and not arguments.json:
        print(f"{record['seconds']:.0f} s. Wrote {folder}")
    return code or int(not all(on_disk) or any(change["verdict"] == "slower" for change in changes))
