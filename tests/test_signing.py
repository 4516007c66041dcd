"""Signatures of bundles: by keys and certificates that are made here, and by no one else."""

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from helpers import require_schema
from typer.testing import CliRunner

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.cli import app
from wasi_export.errors import ConfigError, IntegrityError
from wasi_export.manifest import MANIFEST, SIGNATURE, Manifest
from wasi_export.signing import sign_bundle, verify_bundle

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")


def pem(path: Path, key: EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> tuple[Path, Path]:
    """Writes a key; returns the files of the private and the public half."""
    private, public = path.with_suffix(".pem"), path.with_suffix(".pub")
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, spki))
    return private, public


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, Path]:
    return pem(tmp_path / "key", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def signed(bundle: Path, key: tuple[Path, Path]) -> Path:
    sign_bundle(Bundle.open(bundle), key[0], None, ())
    return bundle


def test_a_signed_bundle_is_still_a_bundle_and_is_verified_with_the_public_key(
    signed: Path, key: tuple[Path, Path]
) -> None:
    verify_bundle(Bundle.open(signed), key[1], ())


def test_a_signed_bundle_may_be_moved(signed: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    moved = Path(shutil.move(signed, tmp_path / "elsewhere"))
    verify_bundle(Bundle.open(moved), key[1], ())


def test_a_bundle_that_was_changed_by_someone_who_can_write_manifests_is_not_verified(
    signed: Path, key: tuple[Path, Path]
) -> None:
    (signed / "config.toml").write_text('name = "evil"\n')
    write_bundle_manifest(signed, _manifest(signed))
    with pytest.raises(
        IntegrityError, match=r"bundle\.sig is not of this bundle and this signer: .*config\.toml"
    ):
        verify_bundle(Bundle.open(signed), key[1], ())


def _manifest(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / MANIFEST).read_bytes())


def test_another_signer_is_not_this_one(signed: Path, tmp_path: Path) -> None:
    _, other = pem(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(IntegrityError, match="is not of this bundle and this signer"):
        verify_bundle(Bundle.open(signed), other, ())


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100, b'{"mediaType": 1}', b"[" * 5000])
def test_what_is_no_signature_verifies_nothing(signed: Path, key: tuple[Path, Path], content: bytes) -> None:
    (signed / SIGNATURE).write_bytes(content)
    with pytest.raises(IntegrityError, match="is not of this bundle and this signer"):
        verify_bundle(Bundle.open(signed), key[1], ())


def test_a_signature_of_another_bundle_verifies_nothing(
    signed: Path, key: tuple[Path, Path], finished_bundle: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(finished_bundle, tmp_path / "other"))
    (other / "config.toml").write_text('name = "other"\n')
    write_bundle_manifest(other, _manifest(other))
    shutil.copyfile(signed / SIGNATURE, other / SIGNATURE)
    with pytest.raises(IntegrityError, match="is not of this bundle and this signer"):
        verify_bundle(Bundle.open(other), key[1], ())


def test_a_bundle_without_a_signature_is_not_signed(bundle: Path, key: tuple[Path, Path]) -> None:
    with pytest.raises(IntegrityError, match=r"is not signed: it has no bundle\.sig"):
        verify_bundle(Bundle.open(bundle), key[1], ())


def test_a_key_of_another_kind_is_refused_and_nothing_is_written(bundle: Path, tmp_path: Path) -> None:
    private, _ = pem(tmp_path / "rsa", rsa.generate_private_key(65537, 2048))
    with pytest.raises(ConfigError, match=r"cannot sign with .*: give an EC key in PEM"):
        sign_bundle(Bundle.open(bundle), private, None, ())
    with pytest.raises(ConfigError, match=r"cannot sign with .*: give an EC key in PEM"):
        sign_bundle(Bundle.open(bundle), bundle / "config.toml", None, ())
    assert not (bundle / SIGNATURE).exists()
    (bundle / SIGNATURE).write_bytes(b"{}")
    with pytest.raises(ConfigError, match="is no public key or certificate in PEM"):
        verify_bundle(Bundle.open(bundle), bundle / "config.toml", ())


def test_a_signature_is_replaced_whole(signed: Path, tmp_path: Path) -> None:
    opened, before = Bundle.open(signed), (signed / SIGNATURE).read_bytes()
    os.link(signed / SIGNATURE, tmp_path / "kept")
    private, public = pem(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    sign_bundle(opened, private, None, ())
    assert (tmp_path / "kept").read_bytes() == before  # what was there was not written into
    verify_bundle(Bundle.open(signed), public, ())
    with pytest.raises(ConfigError, match=r"cannot sign with"):
        sign_bundle(Bundle.open(signed), signed / "config.toml", None, ())
    verify_bundle(Bundle.open(signed), public, ())


def test_a_signature_is_not_replaced_without_force(
    signed: Path, key: tuple[Path, Path], tmp_path: Path
) -> None:
    before = (signed / SIGNATURE).read_bytes()
    private, public = pem(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    sign = ["sign", str(signed), "--key", str(private)]
    refused = CliRunner().invoke(app, sign)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == f"error: {signed / SIGNATURE} exists: choose another name or give --force\n"
    assert (signed / SIGNATURE).read_bytes() == before
    assert CliRunner().invoke(app, [*sign, "--force"]).exit_code == 0
    verify_bundle(Bundle.open(signed), public, ())


def certificate(name: str, key, issuer: str, by, *, is_ca: bool) -> bytes:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(named(issuer), named(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_ca,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
    )
    if not is_ca:
        usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING])
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_certificate_is_verified_against_those_who_are_trusted(bundle: Path, tmp_path: Path) -> None:
    root, leaf, stranger = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    private, _ = pem(tmp_path / "leaf", leaf)
    files = {name: tmp_path / f"{name}.crt" for name in ("root", "leaf", "stranger")}
    files["root"].write_bytes(certificate("root", root, "root", root, is_ca=True))
    files["leaf"].write_bytes(certificate("leaf", leaf, "root", root, is_ca=False))
    files["stranger"].write_bytes(certificate("stranger", stranger, "stranger", stranger, is_ca=True))
    sign_bundle(Bundle.open(bundle), private, files["leaf"], (files["root"],))
    verify_bundle(Bundle.open(bundle), None, (files["root"],))
    with pytest.raises(IntegrityError, match="is not of this bundle and this signer"):
        verify_bundle(Bundle.open(bundle), None, (files["stranger"],))


def test_the_commands_sign_and_verify(bundle: Path, key: tuple[Path, Path]) -> None:
    run = CliRunner().invoke
    assert run(app, ["verify", str(bundle), "--key", str(key[1])]).exit_code == 6
    done = run(app, ["sign", str(bundle), "--key", str(key[0]), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["signature"]) == (0, str(bundle / SIGNATURE))
    require_schema("signed", done.stdout)
    require_schema("verified", run(app, ["verify", str(bundle), "--key", str(key[1]), "--json"]).stdout)
    done = run(app, ["verify", str(bundle), "--key", str(key[1])])
    assert (done.exit_code, done.stdout) == (0, "tiny: 3 files as they were signed\n")
    assert run(app, ["verify", str(bundle)]).exit_code == 2
    assert run(app, ["sign", str(bundle), "--key", str(key[0]), "--chain", "x"]).exit_code == 2
    assert run(app, ["validate", str(bundle)]).exit_code == 0
