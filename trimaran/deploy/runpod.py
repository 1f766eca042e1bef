"""``trimaran deploy runpod``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve.errors import ConfigError
from trimaran.deploy.answer import deleted, json_option, teller
from trimaran.deploy.proof import EXITS, carry_out, proof, verify_options

if TYPE_CHECKING:
    from trimaran.platforms.runpod.endpoint import EndpointSpec

name_option = click.option("--name", default="trimaran", show_default=True, help="The endpoint's name.")
id_option = click.option("--id", "endpoint_id", help="Its id, where several endpoints have the name.")


def _listed(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...] | None:
    """Repeated or separated by commas; None when the option was not given."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip()) if values else None


@click.group(
    invoke_without_command=True,
    epilog="Example: trimaran deploy runpod --name chat --image docker.io/me/trimaran:runpod --model Qwen/Qwen3-4B "
    f"--verify\n\n{EXITS}.",
)
@name_option
@id_option
@click.option("--mode", type=click.Choice(["queue", "http"]), default="queue", show_default=True, help="Jobs, or HTTP.")
@click.option("--image", help="The image that you pushed, built with --target runpod.")
@click.option("--model", help="Hub id, or a path in the image.  Default: SERVE_MODEL.")
@click.option("--gpu", "pools", multiple=True, callback=_listed, help="GPU pools, in any order; repeatable.")
@click.option("--exclude-gpu", "excluded", multiple=True, callback=_listed, help="GPU types to leave out of the pools.")
@click.option("--gpu-count", type=click.IntRange(1), help="GPUs of each worker.  Default: 1.")
@click.option("--min-cuda", help="Lowest CUDA version of the driver.  Default: the torch wheel's.")
@click.option("--min", "workers_min", type=click.IntRange(0), help="Workers that always run.  Default: 0.")
@click.option("--max", "workers_max", type=click.IntRange(0), help="Workers at most.  Default: 3.")
@click.option("--idle", "idle_s", type=click.IntRange(1, 3600), help="Seconds until an idle worker ends.  Default: 10.")
@click.option("--weights-gb", type=float, help="Size of the weights: the disk gets room for image and weights.")
@click.option("--disk-gb", type=click.IntRange(1), help="The container's disk.  Default: 40.")
@click.option("--timeout", "timeout_s", type=click.IntRange(5), help="Seconds for one job.  Default: 600.")
@click.option("--flashboot/--no-flashboot", default=None, help="Quicker cold starts.  Default: on.")
@click.option("--volume", "volumes", multiple=True, callback=_listed, help="Network volumes' ids.")
@click.option("--data-center", "data_centers", multiple=True, callback=_listed, help="Where workers may run.")
@click.option("--registry", help="The id of a registry credential, for a private image.")
@click.option("--hf-token-secret", help="The RunPod secret that holds a Hugging Face token.")
@click.option("--api-keys-secret", help="The RunPod secret that holds the server's own keys (mode http).")
@click.option("--cached-model", is_flag=True, help="Say how to let RunPod keep the model on its machines.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="Another variable; repeatable.")
@click.option("--unset", multiple=True, metavar="NAME", help="Remove a variable; repeatable.")
@click.option("--wait/--no-wait", default=False, show_default=True, help="Until a worker of this version is ready.")
@click.option("--dry-run", is_flag=True, help="Print the request; call nothing.")
@verify_options
@click.pass_context
def runpod(context: click.Context, **options: Any) -> None:
    """Create an endpoint on RunPod Serverless, or update the one of that name.

    An update changes only what is named here; variables of the endpoint stay.  The key for the API is RUNPOD_API_KEY.
    Secrets are named, never sent: make them in RunPod's console under Secrets.
    """
    if context.invoked_subcommand is not None:
        return
    from trimaran.platforms.runpod.endpoint import create_body, without_values  # noqa: PLC0415

    spec = _spec(options)
    if options["cached_model"]:
        _say_cached_model(spec)
    if options["dry_run"]:
        click.echo("# POST /v2/serverless (an update sends only what is named, and the merged env)", err=True)
        click.echo(json.dumps(without_values(create_body(spec)), indent=2))
        return
    from trimaran.deploy.on_runpod import RunpodSide  # noqa: PLC0415

    side, asked = RunpodSide(spec, options["endpoint_id"]), proof(options)
    carry_out(side, asked, wait=options["wait"], as_json=options["as_json"])


def _spec(options: dict[str, Any]) -> EndpointSpec:
    from trimaran.config.defaults import deploy_variables  # noqa: PLC0415
    from trimaran.platforms.runpod.endpoint import EndpointSpec, disk_for  # noqa: PLC0415

    secrets = {"HF_TOKEN": options["hf_token_secret"], "SERVE_API_KEYS": options["api_keys_secret"]}
    disk_gb = options["disk_gb"]
    if disk_gb is None and options["weights_gb"] is not None:
        disk_gb = disk_for(options["weights_gb"])
    taken = ("name", "mode", "image", "pools", "excluded", "gpu_count", "min_cuda", "workers_min", "workers_max")
    more = ("idle_s", "timeout_s", "flashboot", "volumes", "data_centers", "registry", "unset")
    return EndpointSpec(
        **{name: options[name] for name in (*taken, *more)},
        model=_model(options["model"]),
        disk_gb=disk_gb,
        environment={**deploy_variables(), **dict(_pair(variable) for variable in options["variables"])},
        secrets={name: secret for name, secret in secrets.items() if secret},
    )


def _model(given: str | None) -> str | None:
    from trimaran.config.defaults import model_in_force  # noqa: PLC0415

    model = given or model_in_force() or None
    if model and Path(model).expanduser().is_dir():
        raise ConfigError(
            f"{model} is a folder of this machine: bake it into the image and give its path there, or push it to a "
            "private Hub repository and name that (docs/guides/runpod.md says how)"
        )
    return model


def _pair(variable: str) -> tuple[str, str]:
    name, separator, value = variable.partition("=")
    if not separator or not name:
        raise ConfigError(f"--env {variable}: write NAME=VALUE")
    if name in {"HF_TOKEN", "SERVE_API_KEYS", "RUNPOD_API_KEY"}:
        raise ConfigError(
            f"--env {name}: RunPod would show it in plain text; make a RunPod secret and use --hf-token-secret or "
            "--api-keys-secret"
        )
    return name, value


def _say_cached_model(spec: EndpointSpec) -> None:
    click.echo(
        "REST v2 has no field for a cached model.  Set it in the console (Model), or create the endpoint with\n"
        f"  runpodctl serverless create --name {spec.name} --model-reference https://huggingface.co/{spec.model}:main",
        err=True,
    )


@runpod.command(epilog="Example: trimaran deploy runpod status --name chat")
@name_option
@id_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(name: str, endpoint_id: str | None, as_json: bool) -> None:
    """Show the endpoint, its workers and its releases."""
    from trimaran.deploy.on_runpod import open_api  # noqa: PLC0415
    from trimaran.platforms.runpod.endpoint import address, without_values  # noqa: PLC0415

    api = open_api()
    endpoint = api.get(name, endpoint_id)
    if as_json:
        shown = {"workers": api.workers(endpoint["id"])["workers"], "releases": api.releases(endpoint["id"])[:5]}
        click.echo(json.dumps({"endpoint": without_values(endpoint), **shown}, indent=2))
        return
    scale = endpoint["workers"]
    click.echo(f"{endpoint['name']}  {endpoint['id']}  {endpoint.get('type', '')}  {endpoint.get('image', '')}")
    click.echo(f"  workers {scale['min']} to {scale['max']}, flashboot {endpoint['flashboot']}")
    for worker in api.workers(endpoint["id"])["workers"]:
        stale = "  old version" if worker["isStale"] else ""
        click.echo(f"  {worker['id']}  {worker['status']:<12}  {worker.get('gpuTypeId') or ''}{stale}")
    for release in api.releases(endpoint["id"])[:5]:
        fields = ", ".join(change["field"] for change in release["diff"])
        click.echo(f"  version {release.get('version')}  {release['createdAt']}  {fields}")
    click.echo(address(endpoint))


@runpod.command(epilog="Example: trimaran deploy runpod logs --name chat --tail 50")
@name_option
@id_option
@click.option("--worker", "worker_id", help="One worker's id.  Default: all.")
@click.option("--tail", type=click.IntRange(1, 5000), default=100, show_default=True, help="Lines of each worker.")
@click.option(
    "--quiet", "quiet_s", type=float, default=2.0, show_default=True, help="End after seconds without a line."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def logs(name: str, endpoint_id: str | None, worker_id: str | None, tail: int, quiet_s: float, as_json: bool) -> None:
    """Show the workers' latest log lines."""
    from trimaran.deploy.on_runpod import open_api  # noqa: PLC0415

    api = open_api()
    endpoint = api.get(name, endpoint_id)
    workers = [worker_id] if worker_id else [worker["id"] for worker in api.workers(endpoint["id"])["workers"]]
    if not workers:
        click.echo("no worker runs now; RunPod keeps the logs of ended workers in its console", err=True)
    for worker in workers:
        for line in api.logs(endpoint["id"], worker, tail, quiet_s):
            text = f"{line.get('ts', '')}  {worker}  {line.get('line', '')}"
            click.echo(json.dumps({**line, "worker": worker}) if as_json else text)


@runpod.command(epilog="Example: trimaran deploy runpod rollback --name chat")
@name_option
@id_option
@click.option("--to", "version", type=int, help="A release's version.  Default: the last one with another image.")
@json_option
def rollback(name: str, endpoint_id: str | None, version: int | None, as_json: bool) -> None:
    """Return to the image of an earlier release; the environment stays as it is."""
    from trimaran.deploy.on_runpod import open_api, return_to  # noqa: PLC0415
    from trimaran.platforms.runpod.endpoint import image_before  # noqa: PLC0415

    api = open_api()
    endpoint = api.get(name, endpoint_id)
    image = image_before(api.releases(endpoint["id"]), str(endpoint.get("image") or ""), version)
    return_to(api, endpoint, image, tell=teller(as_json))


@runpod.command(epilog="Example: trimaran deploy runpod delete --name chat")
@name_option
@id_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def delete(name: str, endpoint_id: str | None, yes: bool, as_json: bool) -> None:
    """Delete the endpoint: its workers end, its jobs are cancelled."""
    from trimaran.deploy.on_runpod import open_api  # noqa: PLC0415

    api = open_api()
    endpoint = api.get(name, endpoint_id)
    if not yes:
        click.confirm(f"Delete {endpoint['name']} ({endpoint['id']}) and cancel its jobs?", abort=True, err=True)
    api.delete(endpoint["id"])
    deleted("runpod", endpoint["name"], endpoint["id"], as_json)
