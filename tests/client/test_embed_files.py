"""Folders of `jina-v4-embed`: every file and frame is a row, or is named and counted at the end."""

import base64
import cProfile
import io
import json
import os
import pstats
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from embed_command import Embed, embed_with, read, read_errors, write_jsonl
from jina_v4_client import _images
from jina_v4_client.embed.folder import walk
from PIL import Image, TiffImagePlugin

pillow_heif.register_heif_opener()  # the tests write such files
RED, BLUE = ((40, 30), "red"), ((40, 30), "blue")


def picture(size: tuple[int, int], colour: str) -> Image.Image:
    return Image.new("RGB", size, colour)


def written(kind: str, *frames: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    first, *others = [frame.copy() for frame in frames]  # Pillow leaves settings of the writer in them
    first.save(file, kind, **({"save_all": True, "append_images": others} if others else {}), **options)
    return file.getvalue()


def tiff(*frames: Image.Image) -> bytes:
    return written("TIFF", *frames)


def with_smaller_copy() -> bytes:
    """A page, a smaller copy of it, and another page."""
    copy = picture((20, 15), "red")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1
    copy.encoderinfo = {"tiffinfo": tags}  # type: ignore[attr-defined]
    file = io.BytesIO()
    picture(*RED).save(file, "TIFF", save_all=True, append_images=[copy, picture(*BLUE)])
    return file.getvalue()


def without_second_frame(next_frame: int) -> bytes:
    """A TIFF file of one frame that says that another one is at some place."""
    content = bytearray(tiff(picture(*RED)))
    (start,) = struct.unpack("<I", content[4:8])
    (n_tags,) = struct.unpack("<H", content[start : start + 2])
    end = start + 2 + 12 * n_tags
    content[end : end + 4] = struct.pack("<I", next_frame if next_frame >= 0 else start)
    return bytes(content)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    made = Path("folder")
    made.mkdir()
    return made


@pytest.fixture
def embed(server: Any, folder: Path) -> Embed:
    server.play_ours()
    return embed_with("--base-url", server.url, "--task", "retrieval", "--max-retries", 0)


@pytest.fixture(params=["with pillow-heif", "without"])
def heif(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether HEIC can be read."""
    if request.param == "without":
        monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    _images._formats.cache_clear()
    yield request.param != "without"
    monkeypatch.undo()
    _images._formats.cache_clear()


def rows_of(embed: Embed, *inputs: object) -> tuple[dict[str, bytes], int, list[str]]:
    """Give the vector of each row, the exit code, and what was said but for the summary."""
    ran = embed(*inputs, "out.parquet")
    ids, vectors = read(Path("out.parquet"))
    said = [line for line in ran.stderr.splitlines() if " rows in " not in line and not line.startswith("wrote ")]
    return dict(zip(ids, (vector.tobytes() for vector in vectors), strict=True)), ran.code, said


def vector_of(server: Any, image: Image.Image) -> bytes:
    """Give the vector that the played server gives a picture, as the client sends it."""
    return np.asarray(server.vector(_images.prepare(image).data_uri()), np.float32).tobytes()


def test_the_type_of_a_file_is_known_by_its_first_bytes(embed: Embed, folder: Path, heif: bool) -> None:
    red = picture(*RED)
    files = {
        "B.JPG": written("JPEG", red),
        "D.PDF": written("PDF", red),
        "a.jpe": written("JPEG", red),
        "a pdf.png": written("PDF", red),
        "a jpeg.pdf": written("JPEG", red),
        "no ending": written("PNG", red),
        "p.j2k": written("JPEG2000", red),
        "q.avif": written("AVIF", red),
        "t.tga": written("TGA", red),
        "odd.ending": written("WEBP", red),
        "sub/x.bmp": written("BMP", red),
    }
    if heif:
        files["IMG_1.HEIC"] = written("HEIF", red)
    left_out = {
        "Python": (b"Python is a snake", "not an image"),  # begins as a PPM file would
        "c.svg": (b'<?xml version="1.0"?>\n<svg xmlns="x"></svg>', "SVG"),
        "page.html": (b"<html><svg></svg></html>", "not an image"),
        "raw.dng": (tiff(red, red.copy()), "a kind of TIFF that is not read here (.dng)"),
        "readme.txt": (b"hi", "a text or a table"),
        "rows.jsonl": (b"{}", "a text or a table"),
        "x.zip": (b"PK\3\4", "not an image"),
    }
    if not heif:
        content = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0" * 40
        left_out["IMG_1.HEIC"] = (content, "pip install 'jina-v4-client[heif]'")
    for name, content in [*files.items(), *((name, content) for name, (content, _) in left_out.items())]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / ".hidden").touch()
    rows, code, said = rows_of(embed, folder)
    pages = {f"folder/{name}" + ("#1" if content.startswith(b"%PDF") else "") for name, content in files.items()}
    assert rows.keys() == pages
    assert code == 3
    names = sorted(f"folder/{name}" for name in left_out)
    assert said == [f"{len(names)} files were left out; out.parquet.errors.jsonl says why: {', '.join(names)}"]
    errors = {line["id"]: line for line in read_errors("out.parquet")}
    assert sorted(errors) == names
    for name, (_, why) in left_out.items():
        line = errors[f"folder/{name}"]
        assert line["row"] is None
        assert why in line["error"]


def test_a_heic_file_has_the_vector_of_the_picture_in_it(server: Any, embed: Embed, folder: Path) -> None:
    (folder / "a.heic").write_bytes(written("HEIF", picture(*RED)))
    rows, code, _ = rows_of(embed, folder)
    decoded = Image.open(folder / "a.heic")
    assert (rows, code) == ({"folder/a.heic": vector_of(server, decoded)}, 0)


def test_many_files_that_are_left_out_are_counted_and_the_first_are_named(embed: Embed, folder: Path) -> None:
    (folder / "a.png").write_bytes(written("PNG", picture(*RED)))
    for number in range(12):
        (folder / f"{number:02}.txt").touch()
    _, code, said = rows_of(embed, "--quiet", folder)
    ten = ", ".join(f"folder/{number:02}.txt" for number in range(10))
    assert code == 3
    assert said == [f"12 files were left out; out.parquet.errors.jsonl says why: {ten} and 2 more"]
    assert len(read_errors("out.parquet")) == 12
    for path in folder.glob("*.txt"):
        path.unlink()
    assert embed("--force", folder, "out.parquet").code == 0
    assert not Path("out.parquet.errors.jsonl").exists()


def test_in_a_pipe_files_that_are_left_out_have_lines_after_all_rows(embed: Embed, folder: Path) -> None:
    (folder / "b.png").write_bytes(written("PNG", picture(*RED)))
    (folder / "a.txt").touch()
    ran = embed("--quiet", folder, "-")
    row, left_out = map(json.loads, ran.stdout.splitlines())
    assert (row["id"], left_out["id"], ran.code) == ("folder/b.png", "folder/a.txt", 3)
    assert "a text or a table" in left_out["error"]
    assert ran.line == "1 file was left out; their lines say why: folder/a.txt"


def test_linked_folders_are_followed_once_and_loops_end(embed: Embed, folder: Path) -> None:
    for path in ("real/a.png", "real/deep/b.png", ".store/hidden.png", "../outside/o.png", "../outside/in/p.png"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(written("PNG", picture(*RED)))
    links = {
        "alias": "real",  # its files are rows already
        "real/deep/up": "..",
        "real/deep/upper": "../..",
        "stored": ".store",  # hidden, but for this link
        "out": "../outside",
        "again": "../outside",
        "out2": "../outside/in",
        "../outside/self": ".",
        "../outside/back": "../folder/real",
        "above": "..",
        "dead.png": "nowhere",
        "itself": "itself",
    }
    for link, target in links.items():
        (folder / link).symlink_to(target)
    (folder / "c.png").symlink_to("real/a.png")
    os.mkfifo(folder / "pipe.png")
    rows, code, said = rows_of(embed, folder)
    assert list(rows) == [
        "folder/again/in/p.png",
        "folder/again/o.png",
        "folder/c.png",
        "folder/real/a.png",
        "folder/real/deep/b.png",
        "folder/stored/hidden.png",
    ]
    assert code == 3
    assert said[0].endswith("why: folder/above, folder/dead.png, folder/itself, folder/pipe.png")


@pytest.mark.parametrize("part", ["favourites", "zfavourites"])  # read before the whole, and after it
def test_a_linked_folder_is_read_whole_where_another_link_leads_into_it(part: str, embed: Embed, folder: Path) -> None:
    for path in ("2025/a.png", "2025/more/b.png", "2026/c.png", "d.png"):
        (folder / "../store" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "../store" / path).write_bytes(written("PNG", picture(*RED)))
    (folder / part).symlink_to("../store/2025")
    (folder / "scans").symlink_to("../store")
    (folder / "../store/2026/all").symlink_to("..")
    (folder / "../store/2025/up").symlink_to("..")
    rows, code, said = rows_of(embed, folder)
    first = part if part == "favourites" else "scans/2025"
    files = [f"{first}/a.png", f"{first}/more/b.png", "scans/2026/c.png", "scans/d.png"]
    assert list(rows) == [f"folder/{file}" for file in files]
    assert code == (3 if part == "favourites" else 0)
    assert [line.partition("why: ")[2] for line in said] == ["folder/favourites/up"] * (code == 3)


def test_each_linked_folder_costs_the_same_however_many_there_are(tmp_path: Path) -> None:
    def n_calls(n_links: int) -> int:
        folder = tmp_path / str(n_links)
        folder.mkdir()
        for i in range(n_links):
            (tmp_path / f"store/{n_links}-{i}").mkdir(parents=True)
            (folder / str(i)).symlink_to(tmp_path / f"store/{n_links}-{i}")
        profile = cProfile.Profile()
        assert profile.runcall(lambda: [*walk(str(folder))]) == []
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined] # it has it

    assert n_calls(400) < 3 * n_calls(200)


def test_frames_of_a_tiff_are_pages(server: Any, embed: Embed, folder: Path) -> None:
    red, blue = picture(*RED), picture(*BLUE)
    (folder / "one.tif").write_bytes(tiff(red))
    (folder / "two.tiff").write_bytes(tiff(red, blue))
    (folder / "palettes").write_bytes(tiff(red.quantize(4), blue.quantize(4)))  # alike but for their palettes
    (folder / "smaller.tif").write_bytes(with_smaller_copy())
    rows, code, said = rows_of(embed, folder, folder / "two.tiff")
    assert code == 0
    pages = ["palettes#1", "palettes#2", "smaller.tif#1", "smaller.tif#3", "two.tiff#1", "two.tiff#2"]
    expected = {f"folder/{page}": vector_of(server, red if page.endswith("#1") else blue) for page in pages}
    assert rows == {**expected, "folder/one.tif": vector_of(server, red)}
    note = "a TIFF file with frames that are smaller copies of its pages, or masks: these are no rows"
    assert said == [
        "warning: the ids of 2 rows are those of earlier rows",  # two.tiff is in the folder too
        f"note: 2 rows: {note}: folder/smaller.tif#1, folder/smaller.tif#3",
    ]


@pytest.mark.parametrize(
    ("content", "n_good"),
    [
        pytest.param(lambda: without_second_frame(10**6), 1, id="behind the end"),
        pytest.param(lambda: without_second_frame(9), 1, id="no frame there"),
        pytest.param(lambda: tiff(picture(*RED), picture(*BLUE))[:-1000], 1, id="cut off"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # Pillow says that these files are broken
def test_a_tiff_that_breaks_off_gives_its_good_frames_and_an_error(
    content: Callable[[], bytes], n_good: int, embed: Embed, folder: Path
) -> None:
    (folder / "a.tif").write_bytes(content())
    rows, code, said = rows_of(embed, "--on-error", "skip", folder)
    assert list(rows) == [f"folder/a.tif#{number}" for number in range(1, n_good + 1)]
    assert (code, said[-1]) == (3, "1 of 2 rows were skipped; out.parquet.errors.jsonl says why")
    (error,) = read_errors("out.parquet")
    assert (error["row"], error["id"]) == (2, "folder/a.tif#2")
    assert "the frame cannot be read" in error["error"]


def test_a_tiff_whose_frames_loop_ends(embed: Embed, folder: Path) -> None:
    (folder / "a.tif").write_bytes(without_second_frame(-1))
    rows, code, _ = rows_of(embed, folder)
    assert (list(rows), code) == (["folder/a.tif"], 0)


def test_of_an_animation_the_first_frame_is_embedded_and_a_line_says_so(
    server: Any, embed: Embed, folder: Path
) -> None:
    red, blue = picture(*RED), picture(*BLUE)
    for name, kind in (("a.gif", "GIF"), ("a.png", "PNG"), ("a.webp", "WEBP"), ("phone.jpg", "MPO")):
        (folder / name).write_bytes(written(kind, red, blue))
    (folder / "still.gif").write_bytes(written("GIF", red))
    write_jsonl(Path("rows.jsonl"), [{"image": "two.tif"}])
    Path("two.tif").write_bytes(tiff(red, blue))
    rows, code, said = rows_of(embed, "--image-column", "image", folder, "rows.jsonl")
    assert code == 0
    assert len(rows) == 6
    assert {rows[f"folder/{name}"] for name in ("a.gif", "still.gif")} == {vector_of(server, red)}
    assert rows["rows.jsonl#1"] == vector_of(server, red)
    many = "folder/a.gif, folder/a.png, folder/a.webp, rows.jsonl#1"  # and not the second picture of a phone's JPEG
    note = "an animation or several pictures in one file: the first is embedded, as by the published code"
    assert said[0] == f"note: 4 rows: {note}: {many}"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_8_bits_are_white_and_a_line_says_so(
    mode: str, server: Any, embed: Embed, folder: Path
) -> None:
    kind = "PNG" if mode == "I;16" else "TIFF"
    for name, value in (("a", 5000), ("b", 60000)):
        (folder / name).write_bytes(written(kind, Image.new(mode, (40, 30), value)))
    deep = base64.b64encode((folder / "a").read_bytes()).decode()
    (folder / "plain.png").write_bytes(written("PNG", picture(*RED)))
    write_jsonl(Path("rows.jsonl"), [{"image": f"data:image/png;base64,{deep}"}])
    rows, code, said = rows_of(embed, "--image-column", "image", folder, "rows.jsonl")
    white = vector_of(server, Image.new("RGB", (40, 30), "white"))
    assert code == 0
    assert [name for name, vector in rows.items() if vector == white] == ["folder/a", "folder/b", "rows.jsonl#1"]
    assert said[0].startswith("note: 3 rows: more than 8 bits a pixel; values above 255 become white")
    assert said[0].endswith(": folder/a, folder/b, rows.jsonl#1")


def test_a_work_folder_of_a_version_with_other_rows_is_not_resumed(embed: Embed, folder: Path) -> None:
    (folder / "a.png").write_bytes(written("PNG", picture(*RED)))
    (folder / "b.png").touch()
    assert embed("--workers", 1, "--image-batch-size", 1, folder, "out.parquet").code == 1
    job = Path("out.parquet.partial/job.json")
    job.write_text(job.read_text().replace('"format": 2', '"format": 1'))
    ran = embed(folder, "out.parquet")
    assert ran.code == 2
    assert "was made by another version of this command; start anew with --restart" in ran.line
