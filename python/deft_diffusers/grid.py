"""Labelled grids of pictures."""

from PIL import Image, ImageDraw, ImageFont

TEXT = 15  # height of the labels in pixels
MARGIN = 8
INK, PAPER = (24, 24, 28), (255, 255, 255)


def wrap(font, text, width):
    """Lines no longer than `width` in the font's pixels, as far as words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def grid(rows, column_labels=None, row_labels=None, title=None, note=None, cell=192):
    """One picture of many.

    `rows` is a list of lists of PIL images (None leaves a cell empty); each is scaled to fit a square of `cell` pixels.
    Labels wrap at the width of a cell, `title` and `note` at that of the page: `column_labels` above the columns,
    `row_labels` left of the rows, `title` on top, `note` below.
    """
    font, bold = ImageFont.load_default(TEXT), ImageFont.load_default(TEXT + 5)
    line = TEXT + 4
    columns = max(map(len, rows))
    above = [wrap(font, text, cell) for text in column_labels or []]
    left = [wrap(font, text, cell) for text in row_labels or []]
    label_width = int(max(font.getlength(t) for lines in left for t in lines)) + MARGIN if left else 0
    width = label_width + columns * (cell + MARGIN) + MARGIN
    titles = wrap(bold, title, width - 2 * MARGIN) if title else []
    notes = wrap(font, note, width - 2 * MARGIN) if note else []
    head = (len(titles) * (line + 5) + MARGIN if title else 0) + (max(map(len, above)) * line + MARGIN if above else 0)
    foot = head + len(rows) * (cell + MARGIN) + MARGIN
    size = (width, foot + len(notes) * line + (MARGIN if note else 0))
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for n, text in enumerate(titles):
        draw.text((MARGIN, MARGIN + n * (line + 5)), text, INK, bold)
    for n, text in enumerate(notes):
        draw.text((MARGIN, foot + n * line), text, INK, font)
    for k, lines in enumerate(above):
        x = label_width + MARGIN + k * (cell + MARGIN) + cell / 2
        for n, text in enumerate(lines):
            draw.text((x, head - (len(lines) - n) * line), text, INK, font, anchor="ma")
    for j, row in enumerate(rows):
        y = head + MARGIN + j * (cell + MARGIN)
        for n, text in enumerate(left[j] if left else []):
            draw.text((MARGIN, y + cell / 2 + (n - len(left[j]) / 2) * line), text, INK, font)
        for k, image in enumerate(row):
            if image is None:
                continue
            scale = cell / max(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.BICUBIC)
            x = label_width + MARGIN + k * (cell + MARGIN)
            page.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
    return page
