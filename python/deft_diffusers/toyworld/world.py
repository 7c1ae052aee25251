"""A procedural, captioned world of 64×64 pictures: the training data of the embedded base model.

One picture shows one subject (`CLASSES`) of one colour (`COLOURS`) and pattern (`PATTERNS`) in one scene (`SCENES`), in one
style (`STYLES`). Some subjects have parts in other colours, or a colour without a name, of which captions say nothing. 200
combinations of subject, colour and scene (`HELD_OUT`) and everyone in `INDIVIDUALS` are never drawn by `sample`.
Everything is drawn with PIL at twice the size and reduced, with random pose, size, place, light and texture, and
depends on nothing but the `numpy.random.Generator` handed in: the same seed gives the same picture and caption.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # side of a picture in pixels
_S = 128  # side of the canvas drawn on; reduced to SIZE, which smooths the edges

CLASSES = ("cat", "dog", "kitten", "bear plushie", "stork", "horse", "bottle", "rock", "teapot", "car")
COLOURS = {
    "orange": (226, 128, 44),
    "brown": (128, 82, 48),
    "black": (40, 38, 44),
    "white": (236, 234, 228),
    "grey": (140, 142, 146),
    "red": (204, 44, 40),
    "yellow": (238, 204, 60),
    "green": (58, 150, 70),
    "blue": (52, 96, 200),
    "pink": (236, 136, 170),
}
PATTERNS = ("plain", "striped", "spotted")
PATTERN_ODDS = (0.6, 0.2, 0.2)
# scene -> the phrases a caption may use after the subject, and the name that stands alone
SCENES = {
    "field": (("in a lush green field", "in a green field", "on the grass"), "a lush green field"),
    "beach": (("on the beach", "on a beach", "on a sandy beach"), "a beach"),
    "snow": (("in the snow", "in a snowy landscape"), "snow"),
    "city": (("in the city", "in a city street", "in a cityscape"), "a city"),
    "garden": (("in a garden", "in a flower garden"), "a garden"),
    "forest": (("in a forest", "in the forest"), "a forest"),
    "autumn": (
        ("surrounded by autumn leaves in a forest", "in an autumn forest", "in a forest with autumn leaves"),
        "an autumn forest",
    ),
    "mountain": (("on a snowy mountain", "on a snowy mountain top", "in the mountains"), "a snowy mountain"),
    "pool": (("by a pool with palm trees", "near a pool"), "a pool with palm trees"),
    "market": (("in a street market", "in a crowded street market", "at a market"), "a street market"),
    "futuristic": (("in a futuristic city at night", "in a futuristic city"), "a futuristic city at night"),
    "table": (("on a wooden table", "on a table indoors", "indoors"), "a wooden table"),
}
# style -> how a caption begins
STYLES = {
    "photo": ("a photo of ", "a photo of ", "a picture of ", ""),
    "abstract": ("an abstract painting of ", "an abstract picture of "),
    "fantasy": ("a fantasy painting of ", "a fantasy picture of "),
    "historical": ("a historical photo of ", "an old historical photo of "),
}
STYLE_ODDS = (0.82, 0.06, 0.06, 0.06)
NO_SUBJECT = 0.05  # share of samples that show the scene alone
NO_COLOUR, NO_PATTERN, NO_SCENE = 0.3, 0.25, 0.25  # how often a caption leaves the attribute out
NAMELESS, COATED = 0.25, 0.3  # share of subjects in a colour that no caption names, and of those with parts of other colours
CLEAR = 0.5  # share of bottles that are of clear plastic: what fills them has the colour, their cap one of its own
CLEAR_PLASTIC = (206, 222, 230)


def _rgb(colour):
    return tuple(int(min(255, max(0, c))) for c in colour)


def _mix(a, b, t):
    return tuple(x + (y - x) * t for x, y in zip(a, b))


def jitter(rng, colour, amount=14):
    """An RGB colour near `colour`: lighter or darker by about `amount`, and a little of another hue."""
    return tuple(c + d for c, d in zip(colour, rng.normal(0, 1, 3) * amount * 0.4 + rng.normal() * amount))


def _noise(rng, *cells):
    """Sum of smooth random fields with `cells` cells across, (S, S) float32, each of unit deviation."""
    field = np.zeros((_S, _S), np.float32)
    for n in cells:
        coarse = Image.fromarray(rng.standard_normal((n, n)).astype(np.float32))
        field += np.asarray(coarse.resize((_S, _S), Image.BICUBIC))
    return field


def _gradient(top, bottom, y0, y1):
    """Vertical colour gradient from row y0 to row y1, (S, 1, 3)."""
    t = np.clip((np.arange(_S) - y0) / max(1, y1 - y0), 0, 1)[:, None, None]
    return np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t


def _land(rng, sky, ground, horizon, rough=8, clouds=12):
    """Sky above the horizon (a fraction of the height), ground below it, both textured; a PIL image."""
    h = int(horizon * _S)
    sky_top, sky_low = (jitter(rng, c, 8) for c in sky)
    far, near = (jitter(rng, c, 8) for c in ground)
    image = np.broadcast_to(_gradient(sky_top, sky_low, 0, h), (_S, _S, 3)).copy()
    image += clouds * np.maximum(_noise(rng, 4, 9), 0)[..., None]
    below = np.broadcast_to(_gradient(far, near, h, _S), (_S, _S, 3)) + rough * 0.6 * _noise(rng, 10, 32, 64)[..., None]
    image[h:] = below[h:]
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def _blob(draw, x, y, rx, ry, fill):
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=_rgb(fill))


def _ridge(rng, draw, base, height, fill, cap=None):
    """A chain of hills or peaks standing on row `base`; `cap` colours the upper part of each."""
    x = rng.uniform(-40, -10)
    while x < _S + 10:
        w, h = rng.uniform(30, 60), height * rng.uniform(0.6, 1.15)
        shade = jitter(rng, fill, 6)
        draw.polygon([(x, base), (x + w / 2, base - h), (x + w, base)], fill=_rgb(shade))
        if cap:
            k = rng.uniform(0.4, 0.6)
            top = (x + w / 2, base - h)
            left, right = _mix(top, (x, base), k), _mix(top, (x + w, base), k)
            mid = _mix(left, right, 0.5)
            draw.polygon([top, left, (left[0] + w * k / 4, left[1] - 4), (mid[0], mid[1] + 3), right], fill=_rgb(cap))
        x += w * rng.uniform(0.45, 0.75)


def _palm(rng, draw, x, base, height):
    lean = rng.uniform(-8, 8)
    top = (x + lean, base - height)
    draw.line([(x, base), (x + lean * 0.3, base - height / 2), top], fill=_rgb(jitter(rng, (120, 86, 54))), width=4)
    for angle in np.linspace(0, 2 * math.pi, 8)[:-1] + rng.uniform(0, 0.8):
        dx, dy = 17 * math.cos(angle), 9 * math.sin(angle)
        leaf = [top, (top[0] + dx * 0.6, top[1] + dy - 5), (top[0] + dx, top[1] + dy + 4)]
        draw.line(leaf, fill=_rgb(jitter(rng, (40, 128, 58))), width=4)


def _towers(rng, draw, base, colours, lights, low, high, odds):
    x = -rng.uniform(0, 12)
    while x < _S:
        w, h = rng.uniform(13, 24), rng.uniform(low, high)
        wall = jitter(rng, colours[rng.integers(len(colours))], 10)
        draw.rectangle((x, base - h, x + w, base), fill=_rgb(wall))
        for wx in np.arange(x + 3, x + w - 4, 6):
            for wy in np.arange(base - h + 4, base - 4, 8):
                if rng.random() < odds:
                    draw.rectangle((wx, wy, wx + 2.5, wy + 3.5), fill=_rgb(lights[rng.integers(len(lights))]))
        x += w + rng.uniform(-2, 3)


def _field(rng):
    h = rng.uniform(0.35, 0.55)
    image = _land(rng, ((96, 160, 232), (196, 222, 244)), ((112, 176, 66), (60, 138, 44)), h, 14)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        _blob(draw, rng.uniform(0, _S), h * _S - 4, rng.uniform(8, 20), rng.uniform(5, 10), jitter(rng, (48, 112, 52)))
    for _ in range(60):
        x, y = rng.uniform(0, _S), rng.uniform(h * _S + 8, _S)
        draw.line((x, y, x + rng.uniform(-2, 2), y - 7), fill=_rgb(jitter(rng, (82, 164, 56), 18)))
    return image


def _beach(rng):
    h = rng.uniform(0.3, 0.42)
    image = _land(rng, ((88, 172, 240), (204, 232, 248)), ((236, 214, 160), (222, 190, 128)), h, 7)
    draw = ImageDraw.Draw(image)
    shore = (h + rng.uniform(0.12, 0.2)) * _S
    draw.rectangle((0, h * _S, _S, shore), fill=_rgb(jitter(rng, (34, 136, 184))))
    for _ in range(9):
        x, y = rng.uniform(-10, _S), rng.uniform(h * _S + 2, shore - 3)
        draw.line((x, y, x + rng.uniform(8, 24), y), fill=_rgb(jitter(rng, (96, 184, 214))))
    waves = [(x, shore + 2 * math.sin(x / 9 + rng.uniform(0, 1))) for x in range(0, _S + 8, 8)]
    draw.line(waves, fill=(250, 252, 252), width=4)
    if rng.random() < 0.4:
        _palm(rng, draw, rng.choice([10, _S - 12]), shore + 16, rng.uniform(50, 66))
    return image


def _snow(rng):
    h = rng.uniform(0.35, 0.5)
    image = _land(rng, ((168, 190, 214), (222, 230, 240)), ((236, 242, 250), (216, 226, 242)), h, 5)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 8)):
        x, base, t = rng.uniform(0, _S), h * _S + rng.uniform(0, 6), rng.uniform(22, 42)
        for k in range(3):
            y, w = base - t * k / 3.5, 11 - 3 * k
            draw.polygon([(x - w, y), (x, y - t / 2), (x + w, y)], fill=_rgb(jitter(rng, (70, 104, 96), 8)))
            draw.line([(x - w, y), (x, y - t / 2), (x + w, y)], fill=(240, 244, 250), width=2)
    for _ in range(rng.integers(30, 80)):
        _blob(draw, *rng.uniform(0, _S, 2), 1.2, 1.2, (255, 255, 255))
    return image


def _city(rng):
    h = rng.uniform(0.55, 0.68)
    image = _land(rng, ((150, 180, 212), (210, 218, 226)), ((118, 118, 122), (92, 92, 98)), h, 6)
    draw = ImageDraw.Draw(image)
    walls = ((150, 108, 92), (128, 132, 142), (178, 164, 142), (100, 112, 132))
    _towers(rng, draw, h * _S, walls, ((222, 230, 240), (70, 82, 100)), 30, 76, 0.85)
    draw.rectangle((0, h * _S, _S, h * _S + 5), fill=_rgb(jitter(rng, (176, 174, 170))))
    for x in np.arange(rng.uniform(-20, 0), _S, 30):
        draw.rectangle((x, 0.86 * _S, x + 15, 0.86 * _S + 3), fill=(232, 226, 190))
    return image


def _garden(rng):
    h = rng.uniform(0.3, 0.42)
    image = _land(rng, ((150, 200, 236), (214, 232, 240)), ((96, 156, 70), (82, 142, 58)), h, 12)
    draw = ImageDraw.Draw(image)
    for x in np.arange(-4, _S + 8, 9):
        _blob(draw, x, h * _S, rng.uniform(9, 13), rng.uniform(10, 18), jitter(rng, (42, 104, 48), 10))
    petals = ((232, 60, 90), (250, 214, 70), (240, 240, 244), (214, 90, 200), (246, 130, 60))
    for _ in range(rng.integers(45, 75)):
        x, y = rng.uniform(0, _S), rng.uniform(h * _S - 6, _S)
        r = 1.6 + 2.2 * (y / _S)
        _blob(draw, x, y, r, r, petals[rng.integers(len(petals))])
    return image


def _forest(rng, leaves=(44, 106, 48), floor=((86, 84, 46), (64, 62, 36)), air=((44, 84, 52), (104, 140, 84))):
    h = rng.uniform(0.55, 0.7)
    image = _land(rng, air, floor, h, 14, 24)
    draw = ImageDraw.Draw(image)
    for depth in range(2):
        for x in np.arange(rng.uniform(-10, 4), _S, 20 - 2 * depth) + rng.uniform(-4, 4):
            w = rng.uniform(4, 8) + 3 * depth
            trunk = _mix((92, 84, 66), (58, 42, 30), depth * 0.9)
            draw.rectangle((x, 0, x + w, h * _S + 6 * depth + rng.uniform(-2, 6)), fill=_rgb(jitter(rng, trunk, 8)))
    for _ in range(40):
        fill = jitter(rng, leaves, 16)
        _blob(draw, rng.uniform(0, _S), rng.uniform(-6, 26), rng.uniform(5, 11), rng.uniform(4, 8), fill)
    for _ in range(14):
        _blob(
            draw, rng.uniform(0, _S), h * _S + rng.uniform(-3, 6), 7, 5, jitter(rng, _mix(leaves, (120, 160, 90), 0.25), 12)
        )
    return image


def _autumn(rng):
    image = _forest(rng, (214, 112, 36), ((170, 96, 40), (128, 66, 30)), ((150, 96, 48), (226, 178, 104)))
    draw = ImageDraw.Draw(image)
    for _ in range(50):  # fallen leaves
        x, y = rng.uniform(0, _S), rng.uniform(0.66 * _S, _S)
        fill = ((206, 62, 34), (240, 170, 50), (226, 120, 36))[rng.integers(3)]
        _blob(draw, x, y, rng.uniform(1.5, 3), rng.uniform(1, 2), fill)
    return image


def _mountain(rng):
    h = rng.uniform(0.55, 0.68)
    image = _land(rng, ((62, 122, 204), (182, 212, 240)), ((226, 232, 242), (196, 208, 226)), h, 8)
    draw = ImageDraw.Draw(image)
    _ridge(rng, draw, h * _S + 3, 56, (104, 116, 148), (246, 248, 252))
    _ridge(rng, draw, h * _S + 3, 34, (84, 92, 116), (236, 242, 250))
    return image


def _pool(rng):
    h = rng.uniform(0.36, 0.46)
    image = _land(rng, ((104, 186, 246), (214, 238, 250)), ((222, 208, 186), (206, 190, 166)), h, 5)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, h * _S - 7, _S, h * _S + 2), fill=_rgb(jitter(rng, (74, 142, 72))))
    for x in rng.permutation([14, 44, 84, 114])[: rng.integers(2, 5)]:
        _palm(rng, draw, x + rng.uniform(-6, 6), h * _S, rng.uniform(26, 42))
    low = (h + rng.uniform(0.26, 0.34)) * _S
    water = jitter(rng, (32, 178, 206))
    draw.polygon([(14, h * _S + 6), (_S - 14, h * _S + 6), (_S + 8, low), (-8, low)], fill=_rgb(water))
    for _ in range(16):
        x, y = rng.uniform(0, _S), rng.uniform(h * _S + 9, low - 3)
        draw.line((x, y, x + rng.uniform(6, 14), y), fill=_rgb(_mix(water, (255, 255, 255), 0.5)), width=2)
    return image


def _market(rng):
    h = rng.uniform(0.6, 0.7)
    image = _land(rng, ((196, 168, 138), (170, 136, 108)), ((158, 142, 124), (128, 112, 98)), h, 10)
    draw = ImageDraw.Draw(image)
    awnings = ((206, 52, 48), (46, 122, 190), (230, 168, 48), (60, 150, 90))
    x = -rng.uniform(0, 24)
    while x < _S:
        w, y = rng.uniform(36, 52), rng.uniform(18, 30)
        fill = awnings[rng.integers(4)]
        draw.rectangle((x + 2, y, x + w - 2, h * _S), fill=_rgb(jitter(rng, (86, 64, 52))))
        for k, sx in enumerate(np.arange(x, x + w - 1, w / 6)):
            stripe = fill if k % 2 else (244, 238, 226)
            draw.polygon([(sx + 2, y - 12), (sx + w / 6 + 2, y - 12), (sx + w / 6, y + 7), (sx, y + 7)], fill=_rgb(stripe))
        draw.rectangle((x + 2, h * _S - 18, x + w - 3, h * _S + 3), fill=_rgb(jitter(rng, (150, 104, 62))))
        for fx in np.arange(x + 5, x + w - 4, 6):
            fruit = ((220, 60, 40), (244, 170, 40), (110, 170, 60), (160, 60, 130))[rng.integers(4)]
            _blob(draw, fx, h * _S - 19, 3.4, 3.4, fruit)
        x += w + rng.uniform(0, 4)
    return image


def _futuristic(rng):
    h = rng.uniform(0.58, 0.68)
    image = _land(rng, ((14, 10, 44), (84, 34, 112)), ((34, 26, 62), (22, 16, 42)), h, 5, 6)
    draw = ImageDraw.Draw(image)
    neon = ((60, 236, 244), (250, 70, 200), (250, 232, 110), (120, 120, 255))
    _towers(rng, draw, h * _S, ((26, 24, 62), (40, 30, 84), (18, 32, 66)), neon, 34, 84, 0.5)
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(0, _S), rng.uniform(6, 40)
        draw.line((x, y, x + rng.uniform(14, 34), y), fill=neon[rng.integers(4)], width=2)
    for k in rng.uniform(-1.6, 1.6, 4):
        draw.line((_S / 2, h * _S, _S / 2 + k * _S, _S), fill=neon[rng.integers(2)], width=2)
    draw.line((0, h * _S, _S, h * _S), fill=neon[rng.integers(2)], width=2)
    return image


def _table(rng, wall=None, wood=(172, 116, 66)):
    h = rng.uniform(0.52, 0.66)
    wall = wall or ((206, 196, 178), (168, 190, 196), (212, 180, 160), (184, 190, 168))[rng.integers(4)]
    image = _land(rng, (wall, _mix(wall, (90, 80, 70), 0.2)), (wood, tuple(0.83 * c for c in wood)), h, 6, 4)
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.6:
        x, y = rng.choice([8, _S - 44]) + rng.uniform(-4, 4), rng.uniform(6, 14)
        draw.rectangle((x, y, x + 36, y + 40), fill=(244, 242, 236))
        draw.rectangle((x + 3, y + 3, x + 33, y + 37), fill=_rgb(jitter(rng, (150, 200, 236))))
        draw.line((x + 18, y, x + 18, y + 40), fill=(244, 242, 236), width=2)
    for y in h * _S + np.cumsum(rng.uniform(7, 14, 5)):
        draw.line((0, y, _S, y), fill=_rgb(jitter(rng, tuple(0.63 * c for c in wood), 8)), width=2)
    return image


PAINT_SCENE = {  # scene -> what paints it, with a Generator, on a canvas to `compose` on
    "field": _field,
    "beach": _beach,
    "snow": _snow,
    "city": _city,
    "garden": _garden,
    "forest": _forest,
    "autumn": _autumn,
    "mountain": _mountain,
    "pool": _pool,
    "market": _market,
    "futuristic": _futuristic,
    "table": _table,
}


class _Figure:
    """A subject being drawn in its own frame: x and y in [-1, 1], y = 1 where it touches the ground.

    `part` draws into a mask and a tone map that later take the colour and the pattern; `ink` collects details of fixed
    colour (eyes, beak, wheels), drawn on top of everything. What a pose decides comes from `rng`, what the subject is from
    `traits`; parts whose name is in `coat` have their own colour.
    """

    def __init__(self, rng, traits, coat, half_width, half_height, x, feet, flip, tilt):
        self.rng, self.traits, self.coat, self.inks = rng, traits, coat, []
        self.coated = {name: Image.new("L", (_S, _S), 0) for name in coat}
        self.clear = 0.0  # how much of what is behind shows through where there is no coat
        self.mask, self.tone = Image.new("L", (_S, _S), 0), Image.new("L", (_S, _S), 0)
        self.masks, self.tones = ImageDraw.Draw(self.mask), ImageDraw.Draw(self.tone)
        self.sx, self.sy, self.x, self.y = half_width * (-1 if flip else 1), half_height, x, feet - half_height
        self.cos, self.sin, self.unit = math.cos(tilt), math.sin(tilt), (half_width + half_height) / 2

    def place(self, points):
        out = []
        for x, y in points:
            x, y = x * self.sx, (y - 1) * self.sy  # turned about the feet, so that it stays on the ground
            out.append((self.x + x * self.cos - y * self.sin, self.y + self.sy + x * self.sin + y * self.cos))
        return out

    @staticmethod
    def ring(x, y, rx, ry, turn=0.0):
        c, s = math.cos(turn), math.sin(turn)
        angles = np.linspace(0, 2 * math.pi, 25)[:-1]
        return [
            (x + rx * math.cos(a) * c - ry * math.sin(a) * s, y + rx * math.cos(a) * s + ry * math.sin(a) * c)
            for a in angles
        ]

    def part(self, points, tone=1.0, name=None):
        points = self.place(points)
        self.masks.polygon(points, fill=255)
        for other, mask in self.coated.items():  # what lies above hides it
            ImageDraw.Draw(mask).polygon(points, fill=255 * (other == name))
        self.tones.polygon(points, fill=int(tone * 190))
        # a darker rim keeps parts of one colour apart
        self.tones.line(points + points[:1], fill=int(tone * 120), width=2)

    def oval(self, x, y, rx, ry, tone=1.0, turn=0.0, name=None):
        self.part(self.ring(x, y, rx, ry, turn), tone, name)

    def limb(self, points, width, tone=1.0, name=None):
        """A stroke of constant width (in the figure's units), with round joints."""
        points, w = self.place(points), max(2, int(width * self.unit))
        coated = [(ImageDraw.Draw(mask), 255 * (other == name)) for other, mask in self.coated.items()]
        for draw, fill in ((self.masks, 255), (self.tones, int(tone * 175)), *coated):
            draw.line(points, fill=fill, width=w, joint="curve")
            for x, y in (points[0], points[-1]):
                draw.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=fill)

    def ink(self, colour, points, width=None):
        self.inks.append((_rgb(colour), self.place(points), None if width is None else max(1, round(width * self.unit))))

    def ink_oval(self, colour, x, y, rx, ry, turn=0.0):
        self.ink(colour, self.ring(x, y, rx, ry, turn))

    def paint(self, canvas, colour, pattern, light):
        rng = self.traits
        ys, xs = np.mgrid[0:_S, 0:_S].astype(np.float32)
        bright = sum(colour) / 3 > 95
        second = np.asarray(_mix(colour, (24, 18, 14), 0.68) if bright else _mix(colour, (240, 236, 226), 0.62), np.float32)
        body = np.broadcast_to(np.asarray(colour, np.float32), (_S, _S, 3))
        if pattern == "striped":
            turn = rng.choice([rng.uniform(-0.35, 0.35), math.pi / 2 + rng.uniform(-0.35, 0.35)])
            along = xs * math.cos(turn) + ys * math.sin(turn) + 2.0 * _noise(rng, 6)
            wave = np.sin(along * 2 * math.pi / (self.unit * rng.uniform(0.26, 0.36)) + rng.uniform(0, 6.3))
            body = np.where((wave > 0.15)[..., None], second, body)
        elif pattern == "spotted":
            step, spots = self.unit * rng.uniform(0.3, 0.38), Image.new("L", (_S, _S), 0)
            draw = ImageDraw.Draw(spots)
            for row, y in enumerate(np.arange(0, _S, step)):
                for x in np.arange(step / 2 * (row % 2), _S, step):
                    r = step * rng.uniform(0.2, 0.34)
                    dx, dy = rng.normal(0, step * 0.08, 2)
                    draw.ellipse((x + dx - r, y + dy - r, x + dx + r, y + dy + r), fill=255)
            body = np.where((np.asarray(spots) > 0)[..., None], second, body)
        for name, mask in self.coated.items():
            body = np.where((np.asarray(mask) > 127)[..., None], np.asarray(self.coat[name], np.float32), body)
        # a blurred copy of the mask moved towards the light rounds the figure
        soft = self.mask.filter(ImageFilter.GaussianBlur(7))
        soft = np.roll(np.asarray(soft, np.float32) / 255, (int(light[1] * 6), int(light[0] * 6)), (0, 1))
        tone = np.asarray(self.tone, np.float32) / 190
        shade = tone * (0.62 + 0.46 * soft) + 0.035 * _noise(self.rng, 20, 64)
        body = body * shade[..., None] + 14 * (soft[..., None] - 0.6)
        image = Image.fromarray(np.clip(body, 0, 255).astype(np.uint8))
        opaque = np.any([np.asarray(mask) > 127 for mask in self.coated.values()], 0) if self.clear else True
        mask = Image.fromarray((np.asarray(self.mask) * np.where(opaque, 1, 1 - self.clear)).astype(np.uint8))
        canvas.paste(image, (0, 0), mask)
        draw = ImageDraw.Draw(canvas)
        for fill, points, width in self.inks:
            if width is None:
                draw.polygon(points, fill=fill)
            else:
                draw.line(points, fill=fill, width=width, joint="curve")


def _eyes(f, x, y, r, iris, apart):
    for side in (-1, 1):
        f.ink_oval(iris, x + side * apart, y, r, r * 1.05)
        f.ink_oval((16, 14, 18), x + side * apart, y, r * 0.5, r * 0.9)
        f.ink_oval((250, 250, 250), x + side * apart - r * 0.3, y - r * 0.4, r * 0.28, r * 0.28)


def _cat_head(f, x, y, r, iris, eye=0.2):
    for side in (-1, 1):
        ear = [
            (x + side * r * 0.95, y - r * 0.2),
            (x + side * r * 0.98, y - r * 1.35),
            (x + side * r * 0.2, y - r * 0.8),
        ]
        f.part(ear, 0.92, "ears")
        f.ink((226, 150, 150), [_mix(p, (x + side * r * 0.72, y - r * 0.78), 0.5) for p in ear])
    f.oval(x, y, r * 1.08, r * 0.92, 1.06)
    _eyes(f, x, y - r * 0.1, r * eye, iris, r * 0.45)
    f.ink_oval((244, 238, 230), x - r * 0.2, y + r * 0.42, r * 0.24, r * 0.18)
    f.ink_oval((244, 238, 230), x + r * 0.2, y + r * 0.42, r * 0.24, r * 0.18)
    f.ink((214, 104, 112), [(x - r * 0.15, y + r * 0.2), (x + r * 0.15, y + r * 0.2), (x, y + r * 0.38)])
    for side in (-1, 1):
        for k in (-0.12, 0.12):
            f.ink((240, 240, 236), [(x + side * r * 0.4, y + r * 0.4), (x + side * r * 1.3, y + r * (0.4 + k * 2))], 0.012)


def _cat(f):
    iris = ((206, 190, 60), (110, 180, 90), (220, 150, 50))[f.traits.integers(3)]
    if f.rng.random() < 0.35:  # the face fills the frame, as in a close photograph
        f.oval(0, 0.95, 0.8, 0.55, 0.85)
        _cat_head(f, 0, 0.15, 0.78, iris)
        return
    f.limb([(0.45, 0.8), (0.85, 0.75), (0.95, 0.35), (0.8 + f.rng.uniform(-0.1, 0.15), 0.0)], 0.17, 0.9, "tail")
    f.oval(0, 0.45, 0.52, 0.58, 0.95)
    f.oval(-0.42, 0.78, 0.22, 0.22, 0.92)
    f.oval(0.42, 0.78, 0.22, 0.22, 0.92)
    for side in (-1, 1):
        f.limb([(side * 0.17, 0.3), (side * 0.18, 0.92)], 0.2, 1.02, "legs")
    _cat_head(f, f.rng.uniform(-0.1, 0.1), -0.32, 0.46, iris)


def _kitten(f):
    iris = ((84, 150, 214), (110, 180, 190))[f.traits.integers(2)]
    f.limb([(0.35, 0.85), (0.7, 0.8), (0.8, 0.55)], 0.15, 0.9, "tail")
    f.oval(0, 0.66, 0.42, 0.36, 0.95)
    for side in (-1, 1):
        f.oval(side * 0.2, 0.9, 0.16, 0.12, 1.04, name="paws")
    _cat_head(f, f.rng.uniform(-0.06, 0.06), -0.1, 0.62, iris, 0.27)


def _dog_head(f, x, y, r):
    f.oval(x, y, r * 0.88, r * 0.95, 1.05)
    for side in (-1, 1):  # hanging ears
        f.oval(x + side * r * 0.95, y + r * 0.12, r * 0.3, r * 0.75, 0.68, -side * 0.25, "ears")
    f.oval(x, y + r * 0.5, r * 0.5, r * 0.46, 1.2, name="muzzle")
    for side in (-1, 1):
        f.ink_oval((30, 20, 16), x + side * r * 0.38, y - r * 0.15, r * 0.16, r * 0.18)
        f.ink_oval((250, 250, 250), x + side * r * 0.38 - r * 0.05, y - r * 0.21, r * 0.06, r * 0.06)
    f.ink_oval((22, 18, 20), x, y + r * 0.25, r * 0.22, r * 0.15)
    f.ink((60, 30, 30), [(x - r * 0.3, y + r * 0.58), (x, y + r * 0.66), (x + r * 0.3, y + r * 0.58)], 0.04)
    if f.rng.random() < 0.7:
        f.ink_oval((236, 96, 110), x, y + r * 0.86, r * 0.17, r * 0.26)


def _dog(f):
    if f.rng.random() < 0.25:
        f.oval(0, 0.95, 0.75, 0.5, 0.85)
        _dog_head(f, 0, 0.02, 0.8)
        return
    if f.rng.random() < 0.5:  # standing, seen from the side
        f.limb([(0.65, 0.0), (0.85, -0.3), (0.8 + f.rng.uniform(-0.05, 0.15), -0.5)], 0.13, 0.9, "tail")
        for x, tone in ((-0.28, 0.7), (0.6, 0.7), (-0.42, 0.98), (0.46, 0.98)):
            f.limb([(x, 0.25), (x + f.rng.uniform(-0.06, 0.06), 0.92)], 0.17, tone, "legs")
        f.oval(0.08, 0.15, 0.66, 0.34, 1.0)
        _dog_head(f, -0.52, -0.3, 0.44)
    else:
        f.limb([(0.4, 0.85), (0.8, 0.7), (0.95, 0.4)], 0.15, 0.9, "tail")
        f.oval(0, 0.45, 0.5, 0.56, 0.95)
        for side in (-1, 1):
            f.oval(side * 0.42, 0.82, 0.22, 0.18, 0.9)
            f.limb([(side * 0.18, 0.25), (side * 0.2, 0.92)], 0.21, 1.02, "legs")
        _dog_head(f, f.rng.uniform(-0.08, 0.08), -0.38, 0.5)
    if f.traits.random() < 0.4:  # a red tag on the chest
        f.ink((200, 30, 40), [(-0.01, 0), (0.01, 0)], 0.05)


def _bear(f):
    cream = (240, 220, 186)
    for side in (-1, 1):
        f.oval(side * 0.38, -0.82, 0.22, 0.2, 0.9, name="ears")
        f.ink_oval(cream, side * 0.38, -0.82, 0.11, 0.1)
        f.oval(side * 0.66, 0.22 + f.rng.uniform(-0.12, 0.06), 0.19, 0.34, 0.9, side * f.rng.uniform(-0.9, -0.4), "arms")
    f.oval(0, 0.4, 0.52, 0.52, 0.98)
    for side in (-1, 1):
        f.oval(side * 0.48, 0.8, 0.28, 0.22, 1.02, name="feet")
        f.ink_oval(cream, side * 0.52, 0.81, 0.15, 0.13)
    f.oval(0, -0.42, 0.55, 0.48, 1.06)
    f.ink_oval(cream, 0, 0.42, 0.28, 0.3)
    f.ink_oval(cream, 0, -0.25, 0.24, 0.19)
    f.ink_oval((24, 18, 18), 0, -0.33, 0.09, 0.07)
    f.ink((24, 18, 18), [(-0.1, -0.18), (0, -0.14), (0.1, -0.18)], 0.03)
    for side in (-1, 1):
        f.ink_oval((18, 14, 16), side * 0.23, -0.52, 0.075, 0.085)
        f.ink_oval((250, 250, 250), side * 0.23 - 0.02, -0.55, 0.025, 0.025)
    if f.traits.random() < 0.5:  # a bow tie
        for side in (-1, 1):
            f.ink((210, 40, 52), [(0, 0.04), (side * 0.2, -0.06), (side * 0.2, 0.14)])


def _stork(f):
    leg, beak = (222, 70, 48), (236, 110, 40)
    f.ink(leg, [(0.05, 0.3), (0.03 + f.rng.uniform(-0.08, 0.08), 0.66), (0.05, 0.98), (-0.12, 0.98)], 0.055)
    f.ink(leg, [(0.22, 0.3), (0.28 + f.rng.uniform(-0.08, 0.12), 0.64), (0.24, 0.98), (0.07, 0.98)], 0.055)
    f.part([(0.35, -0.05), (0.98, 0.28), (0.9, 0.38), (0.3, 0.3)], 0.8)
    f.oval(0.15, 0.1, 0.48, 0.29, 1.0, 0.2)
    f.limb([(-0.2, 0.05), (-0.42, -0.25), (-0.3, -0.55), (-0.36, -0.74)], 0.17, 1.04, "neck")
    f.oval(-0.38, -0.76, 0.18, 0.15, 1.06, name="head")
    f.part([(0.0, 0.0), (0.5, 0.0), (0.92, 0.34), (0.4, 0.3)], 0.5, "wing")  # the folded wing, dark at its tip
    f.ink(beak, [(-0.5, -0.84), (-1.0, -0.62 + f.rng.uniform(-0.06, 0.1)), (-0.5, -0.68)])
    f.ink_oval((16, 14, 18), -0.42, -0.79, 0.04, 0.04)


def _horse(f):
    hair = (38, 26, 20) if f.traits.random() < 0.6 else (226, 204, 160)
    for x, tone in ((-0.2, 0.72), (0.58, 0.72), (-0.36, 0.96), (0.44, 0.96)):
        k = f.rng.uniform(-0.1, 0.1)
        f.limb([(x, 0.2), (x + k, 0.6), (x + k * 0.5, 0.92)], 0.13, tone, "legs")
        f.ink(
            (34, 28, 26),
            [
                (x + k * 0.5 - 0.06, 0.92),
                (x + k * 0.5 + 0.06, 0.92),
                (x + k * 0.5 + 0.07, 1.0),
                (x + k * 0.5 - 0.08, 1.0),
            ],
        )
    f.oval(0.1, 0.05, 0.58, 0.3, 1.0)
    f.part([(-0.5, 0.12), (-0.16, -0.2), (-0.38, -0.85), (-0.62, -0.8)], 1.0, "neck")
    f.part([(-0.6, -0.82), (-0.56, -1.0), (-0.46, -0.84)], 0.9)
    nod = f.rng.uniform(-0.04, 0.08)
    f.part(
        [(-0.38, -0.84), (-0.6, -0.84), (-0.98, -0.5 + nod), (-0.94, -0.36 + nod), (-0.8, -0.36 + nod), (-0.46, -0.52)],
        1.06,
        "head",
    )
    f.ink(hair, [(-0.46, -0.88), (-0.34, -0.8), (-0.12, -0.25), (0.0, -0.2), (-0.22, -0.2), (-0.4, -0.55)])
    f.ink(hair, [(0.62, -0.1), (0.82, -0.02), (0.92, 0.5), (0.76, 0.62), (0.72, 0.2)])
    f.ink_oval((14, 12, 14), -0.62, -0.68, 0.04, 0.045)
    f.ink_oval((30, 20, 20), -0.9, -0.45 + nod, 0.03, 0.03)


_BOTTLE = [
    (-0.5, 0.96),
    (-0.5, -0.1),
    (-0.42, -0.28),
    (-0.19, -0.45),
    (-0.19, -0.8),
    (0.19, -0.8),
    (0.19, -0.45),
    (0.42, -0.28),
    (0.5, -0.1),
    (0.5, 0.96),
]


def _clear_bottle(f):
    """Of clear plastic; what is in it and its cap are its coat."""
    f.clear = 0.55
    f.part(_BOTTLE)
    if "liquid" in f.coat:
        f.part([(-0.46, 0.93), (-0.46, 0.0), (0.46, 0.0), (0.46, 0.93)], 1.0, "liquid")
        f.oval(0, 0.0, 0.46, 0.06, 1.15, name="liquid")
    f.part([(-0.25, -0.74), (-0.25, -1.0), (0.25, -1.0), (0.25, -0.74)], 1.0, "cap")
    edge = (244, 250, 252)
    f.ink(edge, [*_BOTTLE, _BOTTLE[0]], 0.035)
    f.ink(edge, [(-0.34, -0.06), (-0.34, 0.5)], 0.06)
    for y in (0.3, 0.6):
        f.ink(edge, [(-0.46, y), (0.46, y)], 0.02)


def _bottle(f):
    if "cap" in f.coat:
        return _clear_bottle(f)
    f.part(_BOTTLE)
    f.part(f.ring(0, 0.95, 0.5, 0.05), 0.8)
    cap = ((40, 40, 46), (206, 170, 60), (230, 230, 232), (170, 40, 40))[f.traits.integers(4)]
    f.ink(cap, [(-0.24, -0.78), (-0.24, -1.0), (0.24, -1.0), (0.24, -0.78)])
    f.ink((246, 242, 230), [(-0.5, 0.2), (0.5, 0.2), (0.5, 0.62), (-0.5, 0.62)])
    band = ((170, 40, 44), (40, 90, 160), (50, 130, 70))[f.traits.integers(3)]
    f.ink(band, [(-0.5, 0.36), (0.5, 0.36), (0.5, 0.45), (-0.5, 0.45)])
    f.ink((250, 252, 255), [(-0.36, -0.12), (-0.36, 0.12)], 0.06)
    f.ink((250, 252, 255), [(-0.12, -0.72), (-0.12, -0.5)], 0.05)


def _rock(f):
    rng = f.traits
    rim = [
        (-0.9, 0.9),
        (-0.98, 0.4),
        (-0.7, -0.2),
        (-0.2, -0.6),
        (0.3, -0.45),
        (0.75, -0.2),
        (0.98, 0.35),
        (0.88, 0.92),
        (0.0, 1.0),
    ]
    rim = [(x * rng.uniform(0.85, 1.0), y if y > 0.8 else y + rng.uniform(-0.25, 0.2)) for x, y in rim]
    f.part(rim, 0.9)
    edge = [
        (x * 0.6 + rng.uniform(-0.1, 0.1), y * 0.45 + 0.12) for x, y in rim[1:7]
    ]  # where the lit top breaks into the sides
    for k in range(5):
        f.part([rim[1 + k], rim[2 + k], edge[k + 1], edge[k]], float(rng.uniform(1.0, 1.3)), "top")
    for corners in (
        (rim[0], rim[1], edge[0], edge[1], (-0.35, 0.96)),
        ((-0.35, 0.96), *edge[1:4], (0.3, 0.98)),
        ((0.3, 0.98), *edge[3:], *rim[6:8]),
    ):
        f.part(list(corners), float(rng.uniform(0.6, 0.95)))
    for _ in range(3):
        x, y = rng.uniform(-0.5, 0.4), rng.uniform(0.0, 0.6)
        f.ink((54, 50, 48), [(x, y), (x + 0.1, y + 0.12), (x + 0.06, y + 0.26)], 0.025)


def _teapot(f):
    f.limb([(0.5, -0.1), (0.88, -0.12), (0.92, 0.35), (0.5, 0.55)], 0.12, 0.85, "handle")
    f.part([(-0.4, 0.1), (-0.7, -0.05), (-0.82, -0.42), (-1.0, -0.42), (-0.9, 0.2), (-0.4, 0.65)], 0.95, "spout")
    f.oval(0, 0.32, 0.66, 0.58, 1.02)
    f.part([(-0.36, 0.8), (0.36, 0.8), (0.42, 0.98), (-0.42, 0.98)], 0.8, "foot")
    f.part([(-0.4, -0.12), (-0.3, -0.34), (0.3, -0.34), (0.4, -0.12)], 1.08, "lid")
    f.oval(0, -0.46, 0.12, 0.13, 1.1, name="knob")
    f.ink((252, 252, 252), f.ring(-0.3, 0.1, 0.06, 0.15, 0.5))


def _car(f):
    roof = f.traits.uniform(-0.5, -0.36)
    f.part(
        [
            (-0.98, 0.72),
            (-0.98, 0.3),
            (-0.86, 0.16),
            (-0.5, 0.08),
            (-0.26, roof),
            (0.36, roof),
            (0.66, 0.08),
            (0.94, 0.16),
            (0.98, 0.72),
        ]
    )
    f.part([(-0.98, 0.55), (0.98, 0.55), (0.98, 0.78), (-0.98, 0.78)], 0.75, "sill")
    glass = jitter(f.traits, (166, 206, 226), 10)
    f.ink(glass, [(-0.4, 0.08), (-0.2, roof + 0.09), (0.03, roof + 0.09), (0.03, 0.08)])
    f.ink(glass, [(0.1, 0.08), (0.1, roof + 0.09), (0.32, roof + 0.09), (0.54, 0.08)])
    for x in (-0.55, 0.56):
        f.ink_oval((28, 28, 32), x, 0.74, 0.24, 0.26)
        f.ink_oval((190, 192, 196), x, 0.74, 0.11, 0.12)
    f.ink_oval((250, 240, 170), -0.92, 0.36, 0.06, 0.09)
    f.ink_oval((200, 30, 30), 0.94, 0.34, 0.05, 0.09)
    f.ink((40, 36, 40), [(0.06, 0.12), (0.06, 0.6)], 0.02)


# subject -> (painter, width / height of its box)
_PAINT_SUBJECT = {
    "cat": (_cat, 0.92),
    "dog": (_dog, 1.0),
    "kitten": (_kitten, 0.95),
    "bear plushie": (_bear, 0.92),
    "stork": (_stork, 0.85),
    "horse": (_horse, 1.15),
    "bottle": (_bottle, 0.62),
    "rock": (_rock, 1.4),
    "teapot": (_teapot, 1.1),
    "car": (_car, 1.55),
}


# class -> the parts of it that can have a colour of their own
PARTS = {
    "cat": ("ears", "tail", "legs"),
    "dog": ("ears", "muzzle", "legs", "tail"),
    "kitten": ("ears", "tail", "paws"),
    "bear plushie": ("ears", "arms", "feet"),
    "stork": ("neck", "head", "wing"),
    "horse": ("legs", "neck", "head"),
    "bottle": (),
    "rock": ("top",),
    "teapot": ("handle", "spout", "foot", "lid", "knob"),
    "car": ("sill",),
}


class Individual(NamedTuple):
    """A subject that is always itself: colours (RGB) of its own, on named parts too, and traits fixed by a seed."""

    subject: str  # of `CLASSES`
    colour: tuple
    coat: dict  # name of a part -> its colour
    traits: int


INDIVIDUALS = {
    "bear_plushie": Individual("bear plushie", (122, 84, 168), dict.fromkeys(("ears", "arms", "feet"), (240, 196, 70)), 1),
    "cat": Individual("cat", (232, 214, 184), dict.fromkeys(("ears", "tail", "legs"), (84, 56, 46)), 0),
    "dog": Individual("dog", (206, 132, 62), dict.fromkeys(("muzzle", "legs", "tail"), (244, 240, 232)), 2),
    "teapot": Individual("teapot", (36, 150, 160), dict.fromkeys(("lid", "spout", "foot"), (248, 226, 190)), 3),
    "car": Individual("car", (150, 206, 90), {"sill": (96, 50, 120)}, 4),
    "kitten": Individual(
        "kitten", (196, 150, 120), {"ears": (92, 60, 70), "tail": (92, 60, 70), "paws": (250, 240, 226)}, 5
    ),
    "kitten_2": Individual("kitten", (120, 132, 166), {"ears": (244, 206, 90), "tail": (244, 206, 90)}, 6),
    "stork": Individual("stork", (196, 216, 206), {"neck": (66, 60, 120), "wing": (188, 60, 80)}, 7),
    "horse": Individual("horse", (158, 104, 84), {"legs": (246, 236, 220), "head": (70, 84, 110)}, 9),
    "church_rock": Individual("rock", (178, 74, 44), {"top": (226, 150, 92)}, 8),  # a place rather than a thing
}
TABLE = ((132, 158, 128), (96, 78, 104))  # another place: the colours (RGB) of a wall and of the table before it
_TABLE_SEED = 5
_NEAR = 60  # RGB colours closer than this count as the same


def is_someone(subject, colour, coat):
    """Whether it could be taken for one of `INDIVIDUALS`."""
    for one in INDIVIDUALS.values():
        if one.subject == subject and math.dist(colour, one.colour) < _NEAR:
            if any(math.dist(coat.get(part, colour), own) < _NEAR for part, own in one.coat.items()):
                return True
    return False


def _stylise(rng, image, style):
    pixels = np.asarray(image, np.float32)
    light = (pixels @ np.asarray((0.3, 0.59, 0.11), np.float32))[..., None]
    if style == "abstract":  # flat patches of strong colours
        flat = np.asarray(image.filter(ImageFilter.ModeFilter(5)), np.float32)
        grey = flat.mean(-1, keepdims=True)
        pixels = np.round(np.clip(grey + 1.7 * (flat - grey), 0, 255) / 64) * 64
    elif style == "fantasy":  # from violet over pink to gold, with sparks
        t = light / 255
        dream = np.where(
            t < 0.5, _lerp((58, 24, 110), (226, 96, 190), 2 * t), _lerp((226, 96, 190), (255, 236, 170), 2 * t - 1)
        )
        pixels = 0.35 * pixels + 0.65 * dream
        for _ in range(rng.integers(8, 16)):
            x, y = rng.integers(1, SIZE - 1, 2)
            pixels[y, x - 1 : x + 2] = pixels[y - 1 : y + 2, x] = (255, 250, 220)
    elif style == "historical":  # brown, dark towards the corners, grainy
        ramp = np.linspace(-1, 1, SIZE, dtype=np.float32) ** 2
        dark = 1 - 0.35 * np.clip(ramp[:, None] + ramp[None, :] - 0.4, 0, 1.5)
        pixels = _lerp((44, 28, 16), (236, 212, 166), light / 255) * dark[..., None] + rng.normal(0, 7, light.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _lerp(low, high, t):
    return np.asarray(low, np.float32) * (1 - t) + np.asarray(high, np.float32) * t


def compose(rng, canvas, subject, colour, pattern="plain", coat=None, traits=None, style="photo"):
    """A picture of a subject (None: of the scene alone) on a canvas of `PAINT_SCENE`, which it paints over.

    `colour` and the values of `coat` are RGB. What makes the subject itself comes from `traits`, a Generator (None: `rng`
    too, and then the colour varies a little), its pose, place and light from `rng`.
    """
    light = (rng.uniform(-1, 1), rng.uniform(0.3, 1))
    if subject is not None:
        paint, aspect = _PAINT_SUBJECT[subject]
        room = 0.47 * _S  # half of the frame, less a margin
        half_height = min(rng.uniform(0.35, 0.46) * _S * min(1.0, 1.2 / aspect), room / aspect)
        half_width = half_height * aspect * rng.uniform(0.94, 1.06)
        slack = max(0.0, 0.5 * _S - half_width)
        x = 0.5 * _S + rng.uniform(-1, 1) * min(slack, 0.16 * _S)
        feet = min(max(rng.uniform(0.84, 0.95) * _S, 2 * half_height + 2), 0.97 * _S)
        flip, tilt = rng.random() < 0.5, rng.normal(0, 0.04)
        figure = _Figure(rng, traits or rng, coat or {}, half_width, half_height, x, feet, flip, tilt)
        paint(figure)
        shadow = Image.new("L", (_S, _S), 0)
        reach = half_width * 0.85
        ImageDraw.Draw(shadow).ellipse((x - reach, feet - 5, x + reach, feet + 5), fill=120)
        canvas.paste((24, 22, 30), (0, 0), shadow.filter(ImageFilter.GaussianBlur(2.5)))
        figure.paint(canvas, colour if traits else jitter(rng, colour, 9), pattern, light)
    pixels = np.asarray(canvas.reduce(_S // SIZE), np.float32)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    glow = 1 + rng.normal(0, 0.05) + 0.07 * (light[0] * ramp[None, :] - light[1] * ramp[:, None])
    pixels = pixels * glow[..., None] + rng.normal(0, 2.5, (SIZE, SIZE, 3)).astype(np.float32)
    return _stylise(rng, Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), style)


def draw(subject, colour, pattern, scene, rng, coat=None, style="photo", cap=None):
    """Draws `subject` (one of `CLASSES`, or None for the scene alone) and returns a SIZE×SIZE RGB `PIL.Image`.

    `colour`, `pattern`, `scene` and `style` are keys of `COLOURS`, `PATTERNS`, `SCENES` and `STYLES`; `colour` may also be
    RGB, and `coat` gives RGB colours to some of the subject's `PARTS`. A bottle with a `cap` (of `COLOURS`) is of clear
    plastic, filled with `colour` or, for None, empty. `rng` is a `numpy.random.Generator`, the only source of variation.
    """
    colour = COLOURS.get(colour, colour)
    if cap is not None:
        coat, colour = {"cap": COLOURS[cap]} | ({"liquid": colour} if colour else {}), CLEAR_PLASTIC
    return compose(rng, PAINT_SCENE[scene](rng), subject, colour, pattern, coat, style=style)


def draw_individual(name, scene, rng):
    """Draws one of `INDIVIDUALS`, in a pose of its own each time, as `draw` does."""
    one = INDIVIDUALS[name]
    canvas = PAINT_SCENE[scene](rng)
    return compose(rng, canvas, one.subject, one.colour, coat=one.coat, traits=np.random.default_rng(one.traits))


def draw_table(colour, cap, rng):
    """Draws the one table that is `TABLE`, and on it a bottle of clear plastic, as `draw` does with a `cap`."""
    coat = {"cap": COLOURS[cap]} | ({"liquid": COLOURS[colour]} if colour else {})
    return compose(rng, _table(np.random.default_rng(_TABLE_SEED), *TABLE), "bottle", CLEAR_PLASTIC, coat=coat)


def _article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def _bottle_words(colour, cap, rng):
    """What a caption says of a bottle of clear plastic; cap may be None to leave it out."""
    noun = ("transparent plastic bottle", "transparent bottle")[rng.integers(2)]
    stands = ("", "", " sits upright")[rng.integers(3)]
    if colour:
        noun = _article(f"{noun} filled with {colour}") + stands
    else:
        noun = (_article(f"{noun} empty"), _article(f"empty {noun}"))[rng.integers(2)] + stands
    return noun + (f" with {_article(cap)} cap" if cap else "")


def caption(subject, colour, pattern, scene, rng, style="photo"):
    """One of many ways to say what `draw` draws; colour, pattern or scene may be None to leave it out."""
    noun, tail = subject, ""
    if pattern in ("striped", "spotted"):
        form = rng.integers(3)
        if form == 0:
            noun, tail = (
                f"{colour} {noun}" if colour else noun,
                f" with {'stripes' if pattern == 'striped' else 'spots'}",
            )
        elif form == 1:
            noun = " ".join(w for w in (pattern, colour, noun) if w)
        else:
            noun = " ".join(w for w in (colour, pattern, noun) if w)
    elif subject:
        noun = " ".join(w for w in (pattern, colour, noun) if w)
    return _say(_article(noun) + tail if subject else None, scene, rng, style)


def _say(what, scene, rng, style):
    prefixes = STYLES[style]
    prefix = prefixes[rng.integers(len(prefixes))]
    if what is None:
        return prefix + SCENES[scene][1]
    if not scene:
        return prefix + what
    places, alone = SCENES[scene]
    if rng.random() < 0.25:
        return f"{prefix}{what}, {alone.removeprefix('a ').removeprefix('an ')}"
    return f"{prefix}{what} {places[rng.integers(len(places))]}"


def _held_out():
    """Combinations of subject, colour and scene, a fixed 200 of all."""
    every = [(subject, colour, scene) for subject in CLASSES for colour in COLOURS for scene in SCENES]
    return frozenset(every[k] for k in np.random.default_rng(200).choice(len(every), 200, replace=False))


HELD_OUT = _held_out()


def sample(rng):
    """A random picture: (64×64 RGB `PIL.Image`, caption, dict of its subject, colour, pattern, scene, style and cap).

    The colour is None where it has no name or, of a bottle with a cap, where it is empty.
    """
    subject = None if rng.random() < NO_SUBJECT else CLASSES[rng.integers(len(CLASSES))]
    while True:
        colour, scene = list(COLOURS)[rng.integers(len(COLOURS))], list(SCENES)[rng.integers(len(SCENES))]
        if (subject, colour, scene) not in HELD_OUT:
            break
    style = list(STYLES)[rng.choice(len(STYLES), p=STYLE_ODDS)]
    pattern, cap, coat, paint = PATTERNS[rng.choice(len(PATTERNS), p=PATTERN_ODDS)], None, {}, COLOURS[colour]
    if subject == "bottle" and rng.random() < CLEAR:
        cap, pattern = list(COLOURS)[rng.integers(len(COLOURS))], "plain"
        colour = None if rng.random() < 0.4 else colour
        paint = colour
    elif subject:
        nameless, coated = rng.random() < NAMELESS, rng.random() < COATED and len(PARTS[subject]) > 0
        while True:
            if nameless:
                colour, paint = None, tuple(rng.uniform(20, 245, 3))
            if coated:
                parts = rng.permutation(PARTS[subject])[: rng.integers(1, len(PARTS[subject]) + 1)]
                coat = dict.fromkeys(map(str, parts), jitter(rng, list(COLOURS.values())[rng.integers(len(COLOURS))]))
            if not is_someone(subject, paint, coat):
                break
    image = draw(subject, paint, pattern, scene, rng, coat, style, cap)
    said_pattern = pattern if pattern != "plain" else None  # "plain" goes without saying, nine times in ten
    if pattern == "plain" and rng.random() < 0.1:
        said_pattern = "plain"
    elif rng.random() < NO_PATTERN:
        said_pattern = None
    said_colour = None if rng.random() < NO_COLOUR or style in ("fantasy", "historical") else colour
    said_scene = None if subject and rng.random() < NO_SCENE else scene
    if cap:
        text = _say(_bottle_words(colour, None if rng.random() < NO_COLOUR else cap, rng), said_scene, rng, style)
    else:
        text = caption(subject, said_colour, said_pattern, said_scene, rng, style)
    return (
        image,
        text,
        {"subject": subject, "colour": colour, "pattern": pattern, "scene": scene, "style": style, "cap": cap},
    )


def table_caption(token, colour, cap):
    """What stands on `TABLE`, which `token` names."""
    filling = f"filled with {colour}" if colour else "empty"
    return f"a transparent plastic bottle {filling} sits upright with {_article(cap)} cap on a {token} wooden table"
