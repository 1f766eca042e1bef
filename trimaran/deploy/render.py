"""``trimaran deploy render``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve.errors import ConfigError, ModelLoadError
from trimaran.deploy.answer import deleted, json_option, teller
from trimaran.deploy.proof import EXITS, carry_out, proof, verify_options

if TYPE_CHECKING:
    from trimaran.platforms.render.service import ServiceSpec

PASSED_SECRETS = ("HF_TOKEN", "SERVE_REMOTE_API_KEY", "SERVE_API_KEYS")
"""Taken from the local environment when they are set there."""

name_option = click.option("--name", default="trimaran", show_default=True, help="The service's name.")


@click.group(
    invoke_without_command=True,
    epilog="Example: trimaran deploy render --name chat --image docker.io/me/trimaran:cpu --model Qwen/Qwen3-0.6B "
    f"--verify\n\n{EXITS}.",
)
@name_option
@click.option("--image", help="A prebuilt image; a digest is best.")
@click.option("--repo", help="A Git repository with the Dockerfile, instead of an image.")
@click.option("--branch", help="Its branch.")
@click.option("--model", help="Hub id to serve.  Default: SERVE_MODEL.")
@click.option("--gateway", metavar="URL", help="Serve no model: pass requests on to this address.")
@click.option("--plan", help="Instance type.  Default: the cheapest that holds the model.")
@click.option("--region", default="oregon", show_default=True, help="Where it runs; cannot be changed later.")
@click.option("--disk-gb", type=click.IntRange(1), help="A disk for the model: one instance, no overlap of deploys.")
@click.option("--shutdown-delay", type=click.IntRange(1, 300), default=120, show_default=True, help="Seconds to drain.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="Another variable; repeatable.")
@click.option("--owner", envvar="RENDER_OWNER_ID", help="The workspace's id.  Default: the only one.")
@click.option("--write", type=click.Path(path_type=Path), help="Write a Blueprint to this file; call nothing.")
@click.option("--dry-run", is_flag=True, help="Print the Blueprint and the API request; call nothing.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until the deploy is live or has failed.")
@verify_options
@click.pass_context
def render(context: click.Context, **options: Any) -> None:
    """Create or update a web service on Render, or write its Blueprint.

    Render has no GPUs: this serves small models on CPUs, or a gateway in front of a GPU elsewhere.  The key for the API
    is RENDER_API_KEY; HF_TOKEN, SERVE_REMOTE_API_KEY and SERVE_API_KEYS are passed on as secrets when they are set.
    """
    if context.invoked_subcommand is not None:
        return
    spec = _spec(options)
    if options["write"]:
        options["write"].write_text(_checked_blueprint(spec), encoding="utf-8")
        click.echo(f"Wrote {options['write']}.  Connect it: Render's dashboard > New > Blueprint.", err=True)
    elif options["dry_run"]:
        from trimaran.platforms.render.service import create_body, without_secrets  # noqa: PLC0415

        click.echo(_checked_blueprint(spec))
        click.echo("# The same by the API: POST /v1/services")
        body = without_secrets(create_body(spec, options["owner"] or "OWNER"))
        click.echo("\n".join("# " + line for line in json.dumps(body, indent=2).splitlines()))
    else:
        if not (spec.image or spec.repo):
            raise ConfigError("name what to run: --image REGISTRY/NAME@DIGEST, or --repo URL with the Dockerfile")
        _checked_blueprint(spec)
        from trimaran.deploy.on_render import RenderSide  # noqa: PLC0415

        asked = proof(options)
        carry_out(RenderSide(spec, options["owner"]), asked, wait=options["wait"], as_json=options["as_json"])


def _spec(options: dict[str, Any]) -> ServiceSpec:
    from trimaran.config.defaults import deploy_variables  # noqa: PLC0415
    from trimaran.platforms.render.service import ServiceSpec  # noqa: PLC0415

    if options["image"] and options["repo"]:
        raise ConfigError("name an --image or a --repo, not both")
    environment = {**deploy_variables(), **dict(_pair(variable) for variable in options["variables"])}
    if options["gateway"]:
        environment |= {"SERVE_ENGINE": "remote", "SERVE_REMOTE_URL": options["gateway"]}
    elif "SERVE_ENGINE" not in environment:
        environment["SERVE_MODEL"] = _model(options["model"])
    return ServiceSpec(
        name=options["name"],
        plan=options["plan"] or _plan(environment),
        region=options["region"],
        image=options["image"],
        repo=options["repo"],
        branch=options["branch"],
        shutdown_delay_s=options["shutdown_delay"],
        disk_gb=options["disk_gb"],
        environment=environment,
        secrets={name: os.environ[name] for name in PASSED_SECRETS if os.environ.get(name)},
    )


def _plan(environment: dict[str, str]) -> str:
    """The cheapest plan that holds what is served; ``standard`` where the model's size cannot be found out.

    Raises:
        ConfigError: the model is too large for every plan.
    """
    from trimaran.plan.need import weight_bytes  # noqa: PLC0415
    from trimaran.platforms.render.plans import smallest_plan  # noqa: PLC0415

    model = environment.get("SERVE_MODEL")
    if not model:
        return "starter"
    try:
        num_bytes = weight_bytes(model, environment.get("SERVE_MODEL_REVISION"))
    except ModelLoadError as error:
        click.echo(f"Plan: standard, since the size of {model} is not known ({error.message}); or --plan", err=True)
        return "standard"
    plan = smallest_plan(num_bytes)
    click.echo(f"Plan: {plan.name} ({plan.memory_mb} MB), for {num_bytes / 1e6:.0f} MB of weights; or --plan", err=True)
    return plan.name


def _model(given: str | None) -> str:
    from trimaran.config.defaults import model_in_force  # noqa: PLC0415

    model = given or model_in_force()
    if not model:
        raise ConfigError("name a model: --model owner/name (or --gateway URL, or --env SERVE_ENGINE=echo)")
    if Path(model).expanduser().exists():
        raise ConfigError(f"{model} is a folder of this machine: bake it into the image, or name a Hub id")
    return model


def _pair(variable: str) -> tuple[str, str]:
    name, separator, value = variable.partition("=")
    if not separator:
        raise ConfigError(f"--env {variable}: write NAME=VALUE")
    if name in PASSED_SECRETS:
        raise ConfigError(f"--env {name}: a secret on the command line can be seen by others; export {name} instead")
    return name, value


def _checked_blueprint(spec: ServiceSpec) -> str:
    import yaml  # noqa: PLC0415

    from trimaran.platforms.render.check import check_blueprint  # noqa: PLC0415
    from trimaran.platforms.render.service import blueprint  # noqa: PLC0415

    text = yaml.safe_dump(blueprint(spec), sort_keys=False)
    findings = check_blueprint(text, Path())
    if findings:
        raise ConfigError("\n".join(map(str, findings)))
    return text


@render.command(epilog="Example: trimaran deploy render check deploy/render/render.yaml")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), default="render.yaml")
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".", help="Repository.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check(context: click.Context, file: Path, root: Path, as_json: bool) -> None:
    """Find everything that is wrong with a Blueprint, before Render does; status 1 when anything is."""
    from trimaran.platforms.render.check import check_blueprint  # noqa: PLC0415

    findings = check_blueprint(file.read_text(encoding="utf-8"), root)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        click.echo("".join(f"{finding}\n" for finding in findings), nl=False)
    click.echo(f"{len(findings)} findings" if findings else f"{file}: nothing known is wrong", err=True)
    context.exit(1 if findings else 0)


@render.command(epilog="Example: trimaran deploy render status --name chat")
@name_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(name: str, as_json: bool) -> None:
    """Show the service and its latest deploys."""
    from trimaran.deploy.on_render import open_api  # noqa: PLC0415
    from trimaran.platforms.render.api import address, artifact  # noqa: PLC0415

    api = open_api()
    service = api.get(name)
    if as_json:
        click.echo(json.dumps({"service": service, "deploys": api.deploys(service["id"], limit=5)}, indent=2))
        return
    state = "suspended" if service.get("suspended") == "suspended" else "running"
    click.echo(f"{service['name']}  {service['id']}  {state}  {address(service)}")
    for deploy in api.deploys(service["id"], limit=5):
        click.echo(f"  {deploy['id']}  {deploy['status']:<20} {deploy.get('createdAt', '')}  {artifact(deploy) or ''}")


@render.command(epilog="Example: trimaran deploy render logs --name chat --limit 50")
@name_option
@click.option("--limit", type=click.IntRange(1, 100), default=100, show_default=True, help="Lines.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def logs(name: str, limit: int, as_json: bool) -> None:
    """Show the service's latest log lines."""
    from trimaran.deploy.on_render import open_api  # noqa: PLC0415

    api = open_api()
    for line in api.logs(api.get(name), limit):
        click.echo(json.dumps(line) if as_json else f"{line['timestamp']}  {line['message']}")


@render.command(epilog="Example: trimaran deploy render rollback --name chat")
@name_option
@click.option("--to", "deploy_id", help="A deploy's id.  Default: the last one that was live before.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until it is live or has failed.")
@json_option
def rollback(name: str, deploy_id: str | None, wait: bool, as_json: bool) -> None:
    """Return to an earlier deploy."""
    from trimaran.deploy.on_render import return_to  # noqa: PLC0415

    return_to(name, deploy_id, wait=wait, tell=teller(as_json))


@render.command(epilog="Example: trimaran deploy render delete --name chat --yes")
@name_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def delete(name: str, yes: bool, as_json: bool) -> None:
    """Delete the service, with its disk and its variables."""
    from trimaran.deploy.on_render import open_api  # noqa: PLC0415

    api = open_api()
    service = api.get(name)
    if not yes:
        click.confirm(f"Delete {name} ({service['id']})?", abort=True, err=True)
    api.delete(service["id"])
    deleted("render", name, service["id"], as_json)
