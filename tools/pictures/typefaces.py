"""Free typefaces with many characters: what they are called, which Debian package holds them, and finding their files.

Of each design one file is listed: bold cuts, proportional twins and renamed derivatives are left out (one bold cut that
looks like another design is in). A font file is found by its name in a folder, or in Debian packages (.deb) and
wheels (.whl) that lie there, which need not be installed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tools.pictures.archives import read_members
from trainer.errors import DataError

SYSTEM_FONTS = Path("/usr/share/fonts")
_FONT_SUFFIXES = (".ttf", ".ttc", ".otf")
_ARCHIVES = (".deb", ".whl")


@dataclass(frozen=True)
class Typeface:
    """A design.

    Attributes:
        name: ours.
        package: the Debian package that holds it.
        licence: as the package's copyright file calls it.
        scripts: ``han``, ``hangul`` or ``both``: what is drawn in it (some draw Han as its Korean reading).
        files: (file name, index in a collection); the first one found is taken.
    """

    name: str
    package: str
    licence: str
    scripts: str
    files: tuple[tuple[str, int], ...]

    def draws(self, script: str) -> bool:
        """Whether it draws ``han``, ``hangul`` or (``both``) any of them."""
        return "both" in (script, self.scripts) or script == self.scripts


def _one(name: str, package: str, licence: str, scripts: str, *files: str, index: int = 0) -> Typeface:
    # Collections are .ttc; a single file of the same design may come from elsewhere.
    listed = tuple((file, index if file.endswith(".ttc") else 0) for file in files)
    return Typeface(name, f"fonts-{package}", licence, scripts, listed)


_UN = "GPL-2"
CATALOGUE = (
    _one("noto-sans", "noto-cjk", "OFL-1.1", "both", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", index=2),
    _one(
        "noto-serif", "noto-cjk", "OFL-1.1", "both", "NotoSerifCJK-Regular.ttc", "NotoSerifCJKsc-Regular.otf", index=2
    ),
    _one("unifont", "unifont", "GPL-2+", "both", "unifont.otf"),
    _one("wqy-zenhei", "wqy-zenhei", "GPL-2 with font embedding exception", "both", "wqy-zenhei.ttc"),
    _one("seto", "seto", "OFL-1.1", "both", "setofont.ttf"),
    _one("droid", "droid-fallback", "Apache-2.0", "han", "DroidSansFallbackFull.ttf"),
    _one("droid-hangul", "droid-fallback", "Apache-2.0", "hangul", "DroidSansFallback.ttf"),
    _one("uming", "arphic-uming", "Arphic Public License", "han", "uming.ttc"),
    _one("ukai", "arphic-ukai", "Arphic Public License", "han", "ukai.ttc"),
    _one("babelstone", "babelstone-han", "Arphic Public License and CC-BY-SA", "han", "BabelStoneHan.ttf"),
    _one("vlgothic", "vlgothic", "M+ and Sazanami and BSD-3-Clause", "han", "VL-Gothic-Regular.ttf"),
    _one("lxgw-wenkai", "lxgw-wenkai", "OFL-1.1", "both", "LXGWWenKai-Regular.ttf"),
    _one("tw-kai", "cns11643-kai", "OGDL-TW-1.0", "han", "TW-Kai-98_1.ttf"),
    _one("tw-sung", "cns11643-sung", "OGDL-TW-1.0", "han", "TW-Sung-98_1.ttf"),
    _one("hanazono", "hanazono", "Hanazono or OFL-1.1", "han", "HanaMinA.ttf"),
    _one("ipamj-mincho", "ipamj-mincho", "IPA-1.0", "han", "ipamjm.ttf"),
    _one("ipa-gothic", "ipafont-gothic", "IPA-1.0", "han", "ipag.ttf"),
    _one("ume-gothic", "horai-umefont", "UmeFont", "han", "ume-tgo4.ttf"),
    _one("ume-mincho", "horai-umefont", "UmeFont", "han", "ume-tmo3.ttf"),
    _one("nanum-gothic", "nanum", "OFL-1.1", "hangul", "NanumGothic.ttf"),
    _one("nanum-gothic-extra-bold", "nanum", "OFL-1.1", "hangul", "NanumGothicExtraBold.ttf"),
    _one("nanum-myeongjo", "nanum", "OFL-1.1", "hangul", "NanumMyeongjo.ttf"),
    _one("nanum-square-round", "nanum", "OFL-1.1", "hangul", "NanumSquareRoundR.ttf"),
    _one("nanum-pen", "nanum-extra", "OFL-1.1", "hangul", "NanumPen.ttf"),
    _one("nanum-brush", "nanum-extra", "OFL-1.1", "hangul", "NanumBrush.ttf"),
    _one("un-batang", "unfonts-core", _UN, "hangul", "UnBatang.ttf"),
    _one("un-dotum", "unfonts-core", _UN, "hangul", "UnDotum.ttf"),
    _one("un-gungseo", "unfonts-core", _UN, "hangul", "UnGungseo.ttf"),
    _one("un-graphic", "unfonts-core", _UN, "hangul", "UnGraphic.ttf"),
    _one("un-pilgi", "unfonts-core", _UN, "hangul", "UnPilgi.ttf"),
    _one("un-dinaru", "unfonts-core", _UN, "hangul", "UnDinaru.ttf"),
    _one("baekmuk-batang", "baekmuk", "Baekmuk (as MIT)", "hangul", "batang.ttf"),
    _one("baekmuk-dotum", "baekmuk", "Baekmuk (as MIT)", "hangul", "dotum.ttf"),
    _one("baekmuk-gulim", "baekmuk", "Baekmuk (as MIT)", "hangul", "gulim.ttf"),
    _one("baekmuk-headline", "baekmuk", "Baekmuk (as MIT)", "hangul", "hline.ttf"),
    _one("bandal", "alee", "Artistic", "hangul", "Bandal.ttf"),
    _one("guseul", "alee", "Artistic", "hangul", "Guseul.ttf"),
    _one("dohyeon", "woowa-bm", "OFL-1.1", "hangul", "BMDOHYEON_ttf.ttf"),
    _one("jua", "woowa-bm", "OFL-1.1", "hangul", "BMJUA_ttf.ttf"),
    _one("yeonsung", "woowa-bm", "OFL-1.1", "hangul", "BMYEONSUNG_ttf.ttf"),
)
# What `lce characters` proposes: few megabytes, many Han characters, and enough for the Hangul syllables.
SMALL_SET = (
    "fonts-unifont",
    "fonts-wqy-zenhei",
    "fonts-droid-fallback",
    "fonts-arphic-uming",
    "fonts-arphic-ukai",
    "fonts-babelstone-han",
    "fonts-seto",
    "fonts-vlgothic",
    "fonts-unfonts-core",
)


@dataclass(frozen=True)
class Found:
    """A typeface and where its font file lies: ``path`` is the file itself, or the archive that holds ``member``."""

    typeface: Typeface
    index: int
    path: Path
    member: str = ""

    def read(self) -> bytes:
        """The font file's content. Raises :class:`trainer.errors.DataError`."""
        if not self.member:
            return self.path.read_bytes()
        return _members(self.path, {PurePosixPath(self.member).name})[self.member]


def find(sources: Sequence[Path], script: str) -> list[Found]:
    """The typefaces of :data:`CATALOGUE` for a script, in its order, that are found in the places.

    Args:
        places: font files, .deb and .whl files, and folders that are searched for them, the first one first.
        script: ``han``, ``hangul`` or ``both``.

    Raises:
        DataError: a place that does not exist, an archive that cannot be read.
    """
    wanted = {file for typeface in CATALOGUE for file, _ in typeface.files}
    files: dict[str, tuple[Path, str]] = {}
    for path in (path for source in sources for path in _files(source)):
        if path.suffix in _FONT_SUFFIXES:
            files.setdefault(path.name, (path, ""))
        else:
            for member in _members(path, wanted):
                files.setdefault(PurePosixPath(member).name, (path, member))
    found = []
    for typeface in CATALOGUE:
        choice = next(((file, index) for file, index in typeface.files if file in files), None)
        if choice is not None and typeface.draws(script):
            path, member = files[choice[0]]
            found.append(Found(typeface, choice[1], path, member))
    return found


def _files(source: Path) -> Iterator[Path]:
    kinds = (*_FONT_SUFFIXES, *_ARCHIVES)
    if source.is_file() and source.suffix in kinds:
        yield source
    elif source.is_dir():
        yield from (path for path in sorted(source.rglob("*")) if path.suffix in kinds and path.is_file())
    else:
        raise DataError(f"--fonts {source}: no such folder, font file, .deb or .whl")


def _members(archive: Path, names: set[str]) -> dict[str, bytes]:
    """The files of these base names in a .deb or .whl: path in the archive → content."""
    remedy = "unpack it yourself (dpkg-deb -x PACKAGE FOLDER) and give the folder"
    return read_members(archive, lambda path: PurePosixPath(path).name in names, remedy)
