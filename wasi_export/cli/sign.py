"""`wasi-export sign` and `verify`: who made a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._console import BundleArgument, JsonFlag, exit_codes, print_json


@exit_codes
def sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option(help="Private elliptic-curve key in PEM.")],
    certificate: Annotated[Path | None, typer.Option(help="Certificate of the key, in PEM.")] = None,
    chain: Annotated[
        list[Path] | None, typer.Option(help="Certificates above it, in PEM; can be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the signature.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Sign all files of a bundle; the signature is beside them, in bundle.sig.

    A key is made by `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`, and what others verify
    with by `openssl ec -in key.pem -pubout -out public.pem`. Needs the extra `trust`; a board that does not
    verify needs nothing.
    """
    from wasi_export.artifact import Bundle
    from wasi_export.cli._documents import SignedBundle
    from wasi_export.durable import require_new
    from wasi_export.errors import ConfigError
    from wasi_export.manifest import SIGNATURE
    from wasi_export.signing import sign_bundle

    if chain and certificate is None:
        raise ConfigError("--chain is of a certificate: give --certificate too")
    require_new(bundle / SIGNATURE, force=force)
    signature = sign_bundle(Bundle.open(bundle), key, certificate, tuple(chain or ()))
    if as_json:
        print_json(SignedBundle(signature=signature))
    else:
        typer.echo(f"signature: {signature}")


@exit_codes
def verify(
    bundle: BundleArgument,
    key: Annotated[Path | None, typer.Option(help="Public key of the signer, in PEM.")] = None,
    chain: Annotated[
        list[Path] | None, typer.Option(help="Trusted certificates, in PEM; can be repeated.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check that a bundle is whole and was signed by the one it should be from.

    Exit code 6 where it is not: no signature, another signer, or a file that was changed since.
    """
    from wasi_export.artifact import Bundle
    from wasi_export.cli._documents import VerifiedBundle
    from wasi_export.errors import ConfigError
    from wasi_export.signing import verify_bundle

    if (key is None) == (not chain):
        raise ConfigError("whose signature it should be is given by --key or by --chain: give one of them")
    opened = Bundle.open(bundle)
    verify_bundle(opened, key, tuple(chain or ()))
    if as_json:
        print_json(VerifiedBundle(bundle=bundle, files=len(opened.manifest.files)))
    else:
        typer.echo(f"{opened.manifest.name}: {len(opened.manifest.files)} files as they were signed")
