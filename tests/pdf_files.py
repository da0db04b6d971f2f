"""Small PDF files, written by hand: what a library would leave out is what the tests are about."""

import hashlib
import zlib
from collections.abc import Sequence


def pdf(objects: Sequence[bytes], trailer: bytes = b"") -> bytes:
    """Write a PDF file of numbered objects, the first of which is the catalogue."""
    content, starts = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, 1):
        starts.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    table += b"".join(b"%010d 00000 n \n" % start for start in starts)
    end = b"trailer\n<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, trailer, len(content))
    return content + table + end


def stream(content: bytes, facts: bytes = b"") -> bytes:
    return b"<<%s/Length %d>>stream\n%s\nendstream" % (facts, len(content), content)


APPEARANCE = b"/Type/XObject/Subtype/Form/BBox[0 0 180 40]/Resources<</Font<</Helv 5 0 R>>>>"
FIELDS = b"/AcroForm<</Fields[6 0 R]/DR<</Font<</Helv 5 0 R>>>>/DA(/Helv 20 Tf 0 g)%s>>"


def page_with(
    annotation: bytes, drawn: bytes | None = None, form: bytes | None = FIELDS % b"", more: bytes = b""
) -> bytes:
    """A page of 200 x 100 points with a line of text and an annotation.

    Args:
        annotation: its entries, beside its place and what it looks like.
        drawn: what it looks like; None to leave that to the reader.
        form: the list of the form's fields; None for a file without.
        more: entries of the page.
    """
    look = b"/AP<</N 7 0 R>>" if drawn is not None else b""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R%s>>" % (form or b""),
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Resources<</Font<</F 5 0 R>>>>/Contents 4 0 R"
        b"/Annots[6 0 R]%s>>" % more,
        stream(b"BT /F 12 Tf 10 80 Td (Name:) Tj ET"),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Type/Annot/Rect[10 20 190 60]/P 3 0 R%s%s>>" % (annotation, look),
        stream(drawn or b"", APPEARANCE),
    ]
    return pdf(objects)


def text_field(value: bytes = b"", flags: int = 4) -> bytes:
    return b"/Subtype/Widget/FT/Tx/T(name)/V(%s)/F %d/DA(/Helv 20 Tf 0 g)" % (value, flags)


FILLED = b"/Tx BMC q BT /Helv 20 Tf 0 g 4 12 Td (Marie) Tj ET Q EMC"
EMPTY = b"/Tx BMC EMC"
ONE_BAD = pdf(
    [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R 4 0 R 5 0 R]/Count 3>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]>>",
        b"(not a page)",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]>>",
    ]
)
NO_PAGES = pdf([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>"])


def check_box(state: bytes) -> bytes:
    return b"/Subtype/Widget/FT/Btn/T(yes)/V/%s/AS/%s/F 4/MK<</CA(4)/BC[0 0 0]>>" % (state, state)


def choice(value: bytes) -> bytes:
    return b"/Subtype/Widget/FT/Ch/Ff 131072/T(who)/Opt[(a)(Marie)]/V(%s)/F 4/DA(/Helv 20 Tf 0 g)" % value


XFA = FIELDS % b"/XFA 4 0 R"

# The same page without and with something that a reader shows.
SHOWN: dict[str, tuple[bytes, bytes]] = {
    "a text": (page_with(text_field(), EMPTY), page_with(text_field(b"Marie"), FILLED)),
    "a text that the reader draws": (page_with(text_field()), page_with(text_field(b"Marie"))),
    "a text of a file that lost its list of fields": (
        page_with(text_field(), EMPTY, form=None),
        page_with(text_field(b"Marie"), FILLED, form=None),
    ),
    "a box": (page_with(check_box(b"Off")), page_with(check_box(b"Yes"))),
    "a choice": (page_with(choice(b"a")), page_with(choice(b"Marie"))),
    "a signature": (
        page_with(b"/Subtype/Widget/FT/Sig/T(s)/F 4", EMPTY),
        page_with(b"/Subtype/Widget/FT/Sig/T(s)/F 4/V<</Type/Sig>>", FILLED),
    ),
    "a text on a turned page": (
        page_with(text_field(), EMPTY, more=b"/Rotate 90"),
        page_with(text_field(b"Marie"), FILLED, more=b"/Rotate 90"),
    ),
    "a text on a cropped page": (
        page_with(text_field(), EMPTY, more=b"/CropBox[0 0 100 100]"),
        page_with(text_field(b"Marie"), FILLED, more=b"/CropBox[0 0 100 100]"),
    ),
    "a text of a form with XFA": (
        page_with(text_field(), EMPTY, form=XFA),
        page_with(text_field(b"Marie"), FILLED, form=XFA),
    ),
    "a stamp": (page_with(b"/Subtype/Stamp/F 4", EMPTY), page_with(b"/Subtype/Stamp/F 4", FILLED)),
    "a mark": (
        page_with(b"/Subtype/Popup/F 4"),
        page_with(b"/Subtype/Highlight/F 4/C[1 1 0]/QuadPoints[10 60 190 60 10 20 190 20]"),
    ),
}


def blank(width: float, height: float) -> bytes:
    return pdf(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %g %g]/Contents 4 0 R>>" % (width, height),
            stream(b"1 0 0 rg 0 0 %g %g re f" % (width / 2, height / 2)),
        ]
    )


def encrypted(password: bytes) -> bytes:
    """A page encrypted with RC4 of 40 bits, as PDF 1.1 has it; with an empty password every reader shows it."""
    padding = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
    owner, permissions, file_id = b"O" * 32, (-4).to_bytes(4, "little", signed=True), b"0123456789abcdef"
    padded = (password + padding)[:32]
    key = hashlib.md5(padded + owner + permissions + file_id, usedforsecurity=False).digest()[:5]
    drawing = b"1 0 0 rg 0 0 50 50 re f"
    of_stream = hashlib.md5(key + (4).to_bytes(3, "little") + b"\0\0", usedforsecurity=False).digest()[:10]
    security = b"<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>" % (
        owner.hex().encode(),
        rc4(key, padding).hex().encode(),
    )
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]/Contents 4 0 R>>",
        stream(rc4(of_stream, drawing)),
        security,
    ]
    ident = file_id.hex().encode()
    return pdf(objects, b"/Encrypt 5 0 R/ID[<%s><%s>]" % (ident, ident))


def rc4(key: bytes, content: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, i, j = bytearray(), 0, 0
    for byte in content:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def drawing(content: bytes, resources: bytes = b"", others: Sequence[bytes] = ()) -> bytes:
    """A page of 200 x 100 points that is drawn by a stream; the other objects are numbered from 5."""
    return pdf(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R/Resources<<%s>>>>" % resources,
            content,
            *others,
        ]
    )


def book(n_pages: int) -> bytes:
    """A file of so many pages, each of another width: the first 101 points, the second 102."""
    kids = b" ".join(b"%d 0 R" % (3 + i) for i in range(n_pages))
    return pdf(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, n_pages),
            *(b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %d 100]>>" % (101 + i) for i in range(n_pages)),
        ]
    )


def spinning(n_steps: int = 100_000) -> bytes:
    """A page whose colours are computed, each by 100,000 steps: minutes of work, in a file of a kilobyte."""
    program = zlib.compress(b"{add " + b"sin " * n_steps + b"}", 9)
    shading = b"<</ShadingType 1/ColorSpace/DeviceGray/Domain[0 1 0 1]/Matrix[200 0 0 100 0 0]/Function 6 0 R>>"
    function = stream(program, b"/FunctionType 4/Domain[0 1 0 1]/Range[0 1]/Filter/FlateDecode")
    return drawing(stream(b"/S sh"), b"/Shading<</S 5 0 R>>", [shading, function])


def crashing() -> bytes:
    """Two kilobytes that become a gigabyte: without so much memory pdfium ends its process."""
    packer, mebibyte = zlib.compressobj(9), b" " * 2**20
    # After a full flush equal bytes are packed equally, so a second piece stands for all that follow.
    first, piece = (packer.compress(mebibyte) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    content = zlib.compress(first + piece * (2**10 - 1), 9)
    return drawing(stream(content, b"/Filter[/FlateDecode/FlateDecode]"))


def with_broken_references(content: bytes) -> bytes:
    """The same objects, none of which is where the table says; readers look for them."""
    table = content.index(b"xref")
    return content[:9] + b"% moved by a program that knows no better\n" + content[9:table] + content[table:]


NO_CATALOGUE = pdf([b"<</Type/Pages/Kids[]/Count 0>>", b"<<>>"])
