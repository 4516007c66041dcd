"""Who made a bundle: an OpenSSF Model Signing signature of all its files, beside them as `bundle.sig`.

The hashes in the manifest say that a bundle is whole; a signature says who says so. The format is a sigstore
bundle over an in-toto statement, and `model_signing verify` of the package `model-signing` reads it as well.
Source: https://github.com/ossf/model-signing-spec
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from wasi_export._extras import require
from wasi_export.artifact import Bundle
from wasi_export.durable import write_bytes
from wasi_export.errors import ConfigError, IntegrityError
from wasi_export.manifest import SIGNATURE

EXTRA = "trust"


def sign_bundle(bundle: Bundle, private_key: Path, certificate: Path | None, chain: tuple[Path, ...]) -> Path:
    """Signs a bundle with an elliptic-curve key; returns the file of the signature, which is replaced.

    Args:
        bundle: the bundle, whose every file was checked.
        private_key: PEM, without a password.
        certificate: PEM, of the key; None: who verifies has the public key.
        chain: PEM, from the one that signed the certificate up to the root.

    Raises:
        ConfigError: a file is no key or certificate, or they do not belong together.
        MissingExtraError: the extra is not installed.
        UsageError: the signature cannot be written; the one before is still there.
    """
    signing, hashing = (require(f"model_signing.{name}", extra=EXTRA) for name in ("signing", "hashing"))
    signature = bundle.path / SIGNATURE
    config = signing.Config().set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE]))
    try:
        if certificate is None:
            config.use_elliptic_key_signer(private_key=private_key)
        else:
            config.use_certificate_signer(
                private_key=private_key, signing_certificate=certificate, certificate_chain=chain
            )
        with TemporaryDirectory() as folder:  # outside: all files of the bundle are signed
            config.sign(bundle.path, Path(folder, SIGNATURE))
            signed = Path(folder, SIGNATURE).read_bytes()
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last: a key of another kind
        raise ConfigError(f"cannot sign with {private_key}: {_line(error)}: give an EC key in PEM") from error
    write_bytes(signature, signed)
    return signature


def verify_bundle(bundle: Bundle, public_key: Path | None, chain: tuple[Path, ...]) -> None:
    """Checks that a bundle was signed with a key, or with one that a chain of certificates vouches for.

    Args:
        bundle: the bundle, whose every file was checked.
        public_key: PEM.
        chain: PEM, trusted roots and those between; used where there is no key.

    Raises:
        IntegrityError: there is no signature, or it is of another key or of other files.
        ConfigError: a file is no key or certificate.
        MissingExtraError: the extra is not installed.
    """
    verifying = require("model_signing.verifying", extra=EXTRA)
    signature = bundle.path / SIGNATURE
    if not signature.exists():
        raise IntegrityError(f"{bundle.path} is not signed: it has no {SIGNATURE}")
    config = verifying.Config()
    try:
        if public_key is not None:
            config.use_elliptic_key_verifier(public_key=public_key)
        else:
            config.use_certificate_verifier(certificate_chain=chain)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        given = public_key or ", ".join(map(str, chain))
        raise ConfigError(f"{given} is no public key or certificate in PEM: {_line(error)}") from error
    try:
        config.verify(bundle.path, signature)
    except Exception as error:  # those of four libraries, for what anybody may have written
        raise IntegrityError(f"{signature} is not of this bundle and this signer: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())
