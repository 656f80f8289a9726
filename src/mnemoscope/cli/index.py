"""``mnemoscope index``: reference sets on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from ..bounds import COUNT, RATE, WORKERS
from ..errors import UnknownName
from ..plugins import document_options
from . import places, screen
from .pairs import number_option, read_pairs
from .pairs import option as _option

if TYPE_CHECKING:
    from ..similarity.index import ReferenceIndex
    from ..similarity.storage import IndexFolder

index_app = typer.Typer(
    name="index",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Build, ask and describe a reference set on disk: pictures that a copy could be of.\n\n"
    "Example: mnemoscope index build pictures --out references",
)


Source = Annotated[
    Path,
    typer.Argument(
        help="Folder, .zip, .tar or Parquet of pictures, or a data set that `datasets` saved.",
        parser=places.file_or_folder,
    ),
]
Folder = Annotated[Path, typer.Argument(help="Folder of the index.", parser=places.folder)]
DescriptorName = Annotated[
    str | None,
    _option("Descriptor, see `mnemoscope ls descriptors`; default: the index's, or fingerprint.", "--descriptor"),
]
DescriptorOption = Annotated[
    list[str] | None, _option("name=value handed to the descriptor; repeatable.", "--descriptor-option")
]
Column = Annotated[str | None, _option("Column of a table that holds the pictures; default: the only one that can.")]
IdColumn = Annotated[str | None, _option("Column of the pictures' ids; default: file and row number.")]
Workers = Annotated[int | None, number_option(WORKERS, "Threads that decode; default: one per CPU.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@index_app.command("build")
def build(
    source: Source,
    out: Annotated[
        Path,
        typer.Option(help="Folder of the index; an index that is there is continued.", parser=places.written_folder),
    ] = Path("references"),
    descriptor: DescriptorName = None,
    descriptor_option: DescriptorOption = None,
    column: Column = None,
    id_column: IdColumn = None,
    prefix: Annotated[str, _option("Stands before the ids; a second source needs one of its own.")] = "",
    dtype: Annotated[str | None, _option("float32 or float16; default float32.")] = None,
    different: Annotated[
        Path | None,
        _option("Pictures known not to be in the set; they fix the threshold of a copy.", parser=places.file_or_folder),
    ] = None,
    fmr: Annotated[float, number_option(RATE, "With --different: stated false-match rate of a search.")] = 0.01,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Index every picture of a source. The same command continues an interrupted build and adds what is new.

    Example: mnemoscope index build pictures --out references
    """
    index = build_index(
        source,
        out,
        descriptor,
        descriptor_option,
        column=column,
        id_column=id_column,
        prefix=prefix,
        dtype=dtype,
        workers=workers,
    )
    if different is not None:
        screen.say(f"Looking up {different} …")
        with screen.stoppable(), quiet_pillow():
            index.calibrate(different, fmr=fmr)
    show_index(index.files, as_json=as_json)


@index_app.command("query")
def query(
    folder: Folder,
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.", parser=places.file_or_folder)],
    k: Annotated[int, number_option(COUNT, "Nearest references of each.", "-k")] = 5,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Find the nearest references of pictures.

    Example: mnemoscope index query references picture.png -k 3
    """
    screen.say_loading(f"Opening {folder} …")
    from ..similarity.index import ReferenceIndex

    with screen.stoppable(), quiet_pillow():
        index = ReferenceIndex(folder)
        for caution in index.files.cautions():
            screen.say(caution)
        answers = [answer for source in _together(pictures) for answer in index.query(source, k, workers=workers)]
    if as_json:
        kept = ("reference", "similarity", "copy_found")
        documents = [
            {
                "picture": a.id,
                "nearest": [{name: getattr(m, name) for name in kept} for m in a.matches],
                "reason": a.reason,
                "note": a.note,
            }
            for a in answers
        ]
        screen.show_json({"descriptor": index.name, "threshold": index.threshold, "pictures": documents})
        return
    rows = []
    for a in answers:
        for rank, m in enumerate(a.matches, 1):
            called = {None: "not calibrated", True: "copy", False: "no"}[m.copy_found]
            rows.append([a.id, str(rank), m.reference, f"{m.similarity:.4f}", called])
        if not a.matches:
            rows.append([a.id, "–", a.reason or "", "–", "–"])
    screen.table(["picture", "rank", "reference", index.name, "copy"], rows, right=(1, 3))


@index_app.command("info")
def info(folder: Folder, as_json: AsJson = False) -> None:
    """What an index holds, with what it was made, and which pictures were skipped and why. Needs no torch.

    Example: mnemoscope index info references
    """
    from ..similarity.storage import IndexFolder

    show_index(IndexFolder(folder), as_json=as_json)


@index_app.command("locate")
def locate(
    folder: Folder,
    pictures: Annotated[
        Path,
        typer.Argument(
            help="Folder, archive or table of the pictures that were indexed.", parser=places.file_or_folder
        ),
    ],
    prefix: Annotated[str, _option("What stands before their ids, of an index with several sources.")] = "",
) -> None:
    """Say where the pictures of an index are: of one that somebody else built, or whose pictures were moved.

    An index is a folder of data and may name any file, so only places that you have named are opened: when you built it, or here.

    Example: mnemoscope index locate references pictures
    """
    from ..similarity.storage import IndexFolder

    with screen.stoppable(), quiet_pillow():
        IndexFolder(folder).locate(pictures, prefix)
    screen.say(f"The pictures of {folder} are shown from {pictures}.")


# What commands share ------------------------------------------------------------------------------------------------------


def build_index(
    source: Path,
    out: Path,
    descriptor: str | None,
    descriptor_option: list[str] | None,
    *,
    dtype: str | None = None,
    **more: Any,
) -> ReferenceIndex:
    """Build or continue an index, and say how far it is."""
    if dtype not in (None, "float16", "float32"):
        raise UnknownName("dtype of an index", dtype, ("float16", "float32"))
    screen.say_loading(f"Indexing {source} …")  # before torch is imported, which takes its time
    from ..similarity.base import DEFAULT
    from ..similarity.index import ReferenceIndex
    from ..similarity.storage import IndexFolder

    options = read_pairs("--descriptor-option", descriptor_option, "side=16")
    if descriptor is None and IndexFolder.exists(out):
        record = IndexFolder(out).manifest.descriptor
        descriptor = record.maker
        if descriptor is not None and not options:
            options = document_options("descriptor", descriptor, record.options)
    with screen.stoppable(), quiet_pillow(), screen.progress("index") as progress:
        return ReferenceIndex.build(
            source,
            out,
            descriptor or DEFAULT,
            options=options,
            dtype=cast(Literal["float16", "float32"] | None, dtype),
            progress=progress,
            **more,
        )


def show_index(files: IndexFolder, *, as_json: bool) -> None:
    """What an index holds."""
    cautions = files.cautions()  # before the manifest is taken: what does not fit it is refused
    m, skipped = files.manifest, files.skipped()
    if as_json:
        facts = {
            "folder": str(files.folder),
            "pictures": len(files),
            "skipped": skipped,
            "search": _search(files),
            "checked": files.checks,
        }
        screen.show_json(m.model_dump(mode="json") | facts)
        return
    calibrated = "not calibrated: no copy is called"
    if m.threshold is not None and m.calibration is not None:
        calibrated = (
            f"{m.threshold:.4f} at {100 * m.calibration.fmr:g} % false matches, from {m.calibration.different} pictures"
        )
    rows = [
        ["folder", str(files.folder)],
        ["status", "done" if m.status == "done" else "not finished: the same command continues"],
        ["pictures", f"{len(files):,}"],
        ["skipped", ", ".join(f"{n:,} {why}" for why, n in skipped.items()) or "none"],
        ["descriptor", m.descriptor.name],
        ["vectors", f"{m.dim or 0} × {m.dtype}"],
        ["search", _search(files)],
        ["checked", files.checks],
        ["threshold", calibrated],
        *(["source", str(s.get("path", s["kind"]))] for s in m.sources),
    ]
    screen.table(["what", "found"], rows, wrap=True)
    for note in [*m.notes, *cautions]:
        screen.say(note)


def _search(files: IndexFolder) -> str:
    facts = files.manifest.search
    if facts is None or files.usable_inverted() is None:
        return "exact"
    found, of = facts["recall"]
    return f"{facts['kind']}, {found} of {of} nearest found"


def _together(pictures: list[Path]) -> list[Path | list[Path]]:
    """Single pictures as one list, so that they are described together; folders and archives each for itself."""
    from ..similarity.decoding import ENDINGS

    single = [p for p in pictures if not os.path.isdir(p) and p.suffix.lower() in ENDINGS]
    return [*([single] if single else []), *(p for p in pictures if p not in single)]


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow warns of odd files one by one; their rows say what is wrong with them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
