"""Labelled grids of pictures."""

from PIL import Image, ImageDraw, ImageFont

TEXT = 15  # height of the labels in pixels
MARGIN = 8
INK, PAPER = (24, 24, 28), (255, 255, 255)


def _wrap(font, text, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def grid(rows, column_labels=None, row_labels=None, title=None, cell=192):
    """One picture of many.

    `rows` is a list of lists of PIL images (None leaves a cell empty); each is scaled to fit a square of `cell` pixels.
    Labels wrap at the width of a cell: `column_labels` above the columns, `row_labels` left of the rows, `title` on top.
    """
    font, bold = ImageFont.load_default(TEXT), ImageFont.load_default(TEXT + 5)
    line = TEXT + 4
    columns = max(map(len, rows))
    above = [_wrap(font, text, cell) for text in column_labels or []]
    left = [_wrap(font, text, cell) for text in row_labels or []]
    label_width = int(max(font.getlength(t) for lines in left for t in lines)) + MARGIN if left else 0
    head = (TEXT + 5 + 2 * MARGIN if title else 0) + (max(map(len, above)) * line + MARGIN if above else 0)
    size = (label_width + columns * (cell + MARGIN) + MARGIN, head + len(rows) * (cell + MARGIN) + MARGIN)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, bold)
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
