"""Whether the libraries are there in versions that fit, and Pillow with the decoders that images need."""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from pipeline.diagnosis.finding import Finding

_DISTRIBUTION: Final = "nightshift-runner"
# Pillow builds these in or not; a picture of one pixel tells.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "GIF", "BMP")
_ESSENTIAL: Final = ("JPEG", "PNG")


def read_requirements() -> list[str] | None:
    """What nightshift requires, as PEP 508 has it; None where it is not installed but runs from its sources."""
    try:
        return importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None


def read_version(library: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_requirements(requirements: Iterable[str] | None, find_version: Callable[[str], str | None]) -> Finding:
    """Whether every library is installed in a version that fits."""
    name = "libraries"
    if requirements is None:
        found = "nightshift runs from its sources and is not installed: what it requires is not compared"
        return Finding(name=name, state="skipped", found=found)
    try:
        from packaging.requirements import Requirement
    except ImportError:
        found = "packaging is not installed, which compares versions"
        return Finding(name=name, state="warning", found=found, remedy="pip install packaging")
    wanted = [
        requirement
        for requirement in map(Requirement, requirements)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    missing, unfit = [], []
    for requirement in wanted:
        version = find_version(requirement.name)
        if version is None:
            missing.append(requirement)
        elif not requirement.specifier.contains(version, prereleases=True):
            unfit.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    if not missing and not unfit:
        return Finding(name=name, state="ok", found=f"all {len(wanted)} are installed in versions that fit")
    reasons = []
    if missing:
        reasons.append(f"not installed: {', '.join(requirement.name for requirement in missing)}")
    if unfit:
        reasons.append(f"versions that do not fit: {', '.join(unfit)}")
    names = {item.split()[0] for item in unfit} | {requirement.name for requirement in missing}
    specifications = " ".join(f"'{requirement}'" for requirement in wanted if requirement.name in names)
    return Finding(name=name, state="fault", found="; ".join(reasons), remedy=f"pip install {specifications}")


def read_decoders() -> tuple[str, dict[str, bool], bool]:
    """Pillow's version, which formats it decodes, and whether it has libjpeg-turbo. Raises ImportError without it."""
    import PIL
    from PIL import Image, features

    decoded = {}
    for format_ in _FORMATS:
        content = io.BytesIO()
        try:
            Image.new("RGB", (16, 16)).save(content, format_)
            Image.open(content, formats=[format_]).load()
            decoded[format_] = True
        except (OSError, KeyError, ValueError):  # each plugin has its own way to say that its library is not there
            decoded[format_] = False
    return PIL.__version__, decoded, bool(features.check_feature("libjpeg_turbo"))


def check_decoders(version: str, decoded: Mapping[str, bool], has_turbo: bool) -> Finding:
    name = "decoders"
    lacking = [format_ for format_, is_there in decoded.items() if not is_there]
    there = ", ".join(format_ for format_, is_there in decoded.items() if is_there)
    upgrade = (
        "install Pillow's own build in place of the system's: pip install --force-reinstall --only-binary :all: pillow"
    )
    if essential := [format_ for format_ in lacking if format_ in _ESSENTIAL]:
        found = f"Pillow {version} cannot decode {', '.join(essential)}"
        return Finding(name=name, state="fault", found=found, remedy=upgrade)
    if lacking:
        found = f"Pillow {version} cannot decode {', '.join(lacking)}: such images would become failed rows"
        return Finding(name=name, state="warning", found=found, remedy=upgrade)
    if not has_turbo:
        found = f"Pillow {version} is built without libjpeg-turbo, and is slow at decoding JPEG"
        return Finding(name=name, state="warning", found=found, remedy=upgrade)
    return Finding(name=name, state="ok", found=f"Pillow {version} with libjpeg-turbo: {there}")
