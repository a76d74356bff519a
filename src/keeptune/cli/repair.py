"""The commands that mend and judge a finished adapter: repair, check."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import echo

from keeptune.cli.shared import Base, Device, Ended, ExitCode, Store, numbers_in


def repair(
    adapter: Annotated[str, typer.Argument(help="An adapter, a run folder or a tuned model.", show_default=False)],
    knowledge: Annotated[
        str | None, typer.Option(help="What to keep, a JSONL file; default: as the run, or the base's own texts.")
    ] = None,
    text: Annotated[str | None, typer.Option(help='Its template, such as "{question}\\nAnswer: {answer}".')] = None,
    task: Annotated[
        str | None, typer.Option(help="The task, a JSONL file; none repairs without; default: that of the run.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help='Its template, such as "{question}\\nAnswer:".')] = None,
    completion: Annotated[str | None, typer.Option(help='Template of what follows, such as " {answer}".')] = None,
    drift: Annotated[float | None, typer.Option(help="Relative feature drift that is left; 0.005.")] = None,
    mu: Annotated[float | None, typer.Option(help="Weight of the knowledge, instead of a drift.")] = None,
    output: Annotated[Path, typer.Option(help="Where the repaired adapter goes.")] = Path("repaired"),
    evaluate: Annotated[
        Path | None, typer.Option(help="A recipe whose benchmarks are scored before and after.")
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="Further values of mu to report, such as 0.03,0.1,0.3,1,3.")] = None,
    base: Base = None,
    rank: Annotated[int, typer.Option(help="Of the result, where the change has no low rank.")] = 64,
    damping: Annotated[float, typer.Option(help="How much the task uses every direction, of the mean.")] = 1e-3,
    rounds: Annotated[int, typer.Option(help="2: once more with the inputs of the repaired model.")] = 1,
    examples: Annotated[int, typer.Option(min=1, help="Knowledge rows used, the first ones.")] = 256,
    task_examples: Annotated[int, typer.Option(min=1, help="Task rows used, drawn.")] = 256,
    max_length: Annotated[int, typer.Option(min=1, help="Longer texts are cut to this many tokens.")] = 1024,
    end_token: Annotated[bool, typer.Option(help="Whether completions of the task end with the end of text.")] = True,
    store: Store = None,
    device: Device = "auto",
) -> Any:
    """Repair an adapter that has forgotten: keep what it does on the task, undo what it does to the knowledge."""
    from keeptune.posthoc.repair import Repair
    from keeptune.posthoc.repair import repair as repair_adapter
    from keeptune.posthoc.repair_files import Files, read_files
    from keeptune.report.tables.analyses import print_repair

    files = Files(knowledge, text, task, prompt, completion, evaluate, examples, task_examples)
    known, learned, benchmarks = read_files(adapter, files)
    options = Repair(
        drift=drift,
        mu=mu,
        rank=rank,
        damping=damping,
        rounds=rounds,
        max_length=max_length,
        end_token=end_token,
        sweep=numbers_in("--sweep", sweep, float, "0.1,0.3,1"),
        store=store,
        device=device,
    )
    record = repair_adapter(adapter, output, options, knowledge=known, task=learned, base=base, benchmarks=benchmarks)
    print_repair(record, Console())
    seconds = record["seconds"]
    echo(f"statistics {seconds['statistics']:.1f} s, solve {seconds['solve']:.1f} s")
    if (output / "repair.png").is_file():
        echo(f"figure: {output / 'repair.png'}")
    echo(f"repaired adapter in {output}, gap {record['export']['relative_gap']:.1e}; numbers: repair.json")
    echo(f"serve: {record['export']['serve']}")
    return record


def check(
    adapter: Annotated[str, typer.Argument(help="Any PEFT adapter, or a run folder.", show_default=False)],
    suite: Annotated[Path, typer.Option(help="A YAML file with an `evaluate` list, as a recipe has.")],
    max_loss: Annotated[
        list[str] | None,
        typer.Option(help="What each benchmark may lose, or benchmark=number: a share or nats per token; 0.01."),
    ] = None,
    base: Base = None,
    estimate: Annotated[
        str, typer.Option(help="What counts: mean, or the lower or upper end of its 95% interval.")
    ] = "mean",
    device: Device = "auto",
) -> Any:
    """Score an adapter against its base; exit code 3 where it lost more of a benchmark than it may."""
    from keeptune.experiments.choice import parse_max_loss
    from keeptune.experiments.gate import check as check_adapter
    from keeptune.report.tables.analyses import print_check

    limits = parse_max_loss(max_loss) if max_loss else 0.01
    record = check_adapter(adapter, suite, limits, base=base, estimate=estimate, device=device)  # type: ignore[arg-type]
    print_check(record, Console())
    return record if record["passed"] else Ended(record, ExitCode.LOST)
