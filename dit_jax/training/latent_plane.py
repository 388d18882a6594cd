"""Pictures of an autoencoder with a latent of two numbers: the decoded plane, and the posterior means of images.

Pillow and NumPy only. N images, H x W pixels, C channels; z1 goes right and z2 goes up.
Source: Kingma & Welling 2014 (Auto-Encoding Variational Bayes), appendix A, figure 4.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_jax.pixels import to_uint8

# Ten colours that are distinct with colour blindness: Petroff 2021 (Accessible Color Sequences for Data Visualization).
PALETTE = np.array(
    [
        (0x3F, 0x90, 0xDA),
        (0xFF, 0xA9, 0x0E),
        (0xBD, 0x1F, 0x01),
        (0x94, 0xA4, 0xA2),
        (0x83, 0x2D, 0xB6),
        (0xA9, 0x6B, 0x59),
        (0xE7, 0x63, 0x00),
        (0xB9, 0xAC, 0x70),
        (0x71, 0x75, 0x81),
        (0x92, 0xDA, 0xDD),
    ]
)
OPACITY = 0.75  # of a dot, so that crowded places show
INK, AXIS, FRAME = (40, 40, 40), (205, 205, 205), (110, 110, 110)
SMALLEST = 200  # pixels; text is not legible below
NORMAL = NormalDist()


def grid_coordinates(side: int, extent: float) -> np.ndarray:
    """float64 [side]: quantiles of the standard normal, equally spaced in probability, ascending from -extent to extent.

    Args:
        side: at least 2.
        extent: in standard deviations, in (0, 5].
    Raises:
        ValueError: an argument outside its range.
    """
    if side < 2 or not 0 < extent <= 5:
        raise ValueError(
            f"side is {side} and extent {extent}; side must be at least 2 and extent lie in (0, 5] standard deviations"
        )
    return np.array([NORMAL.inv_cdf(p) for p in np.linspace(NORMAL.cdf(-extent), NORMAL.cdf(extent), side)])


def latent_plane(decode: Callable[[np.ndarray], np.ndarray], side: int, extent: float = 2.0) -> np.ndarray:
    """uint8 [side, side, H, W, C]: images decoded at the crossings of `grid_coordinates`, the top row at z2 = extent.

    Args:
        decode: float32 [side^2, 2], before a codec's scale and shift, -> images [side^2, H, W, 1 or 3] in about [-1, 1].
        side, extent: as for `grid_coordinates`.
    Raises:
        ValueError: side or extent outside its range, or decode returns other shapes or values.
    """
    coordinates = grid_coordinates(side, extent)
    z2, z1 = np.meshgrid(coordinates[::-1], coordinates, indexing="ij")
    images = np.asarray(decode(np.stack([z1, z2], -1).reshape(-1, 2).astype(np.float32)))
    if images.ndim != 4 or len(images) != side**2 or images.shape[-1] not in (1, 3) or images.dtype.kind in "iub":
        raise ValueError(
            f"decode returned {images.dtype}{list(images.shape)} for {side**2} latents; it must return floats [{side**2}, H, W, "
            "1 or 3] in [-1, 1]"
        )
    if not np.isfinite(images.astype(np.float32)).all():
        raise ValueError("decode returned NaN or infinity; are its parameters those of a trained autoencoder?")
    return np.asarray(to_uint8(images)).reshape(side, side, *images.shape[1:])


def scatter(
    means: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    size: int,
    extent: float | None = None,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """uint8 [size, size + a legend's width, 3]: a dot per image, coloured by label, axes through the origin.

    The picture shows a square around the origin that contains all images. Dots are drawn in a fixed random order.

    Args:
        means: [N, 2], N at least 1.
        labels: integer [N] in [0, num_classes).
        num_classes: 1 to 10, as many as the palette has colours.
        size: height in pixels, at least 200.
        extent: if given, a dashed square marks the part of the plane between -extent and extent, as in `latent_plane`.
        names: names of the classes; default: their numbers.
    Raises:
        ValueError: an argument outside its range, or of another shape.
    """
    means, labels = np.asarray(means, np.float64), np.asarray(labels)
    names = [str(label) for label in range(num_classes)] if names is None else names
    _check_points(means, labels, num_classes, size, names)
    font, small_font = ImageFont.load_default(size / 32), ImageFont.load_default(size / 40)
    row, radius = size / 20, max(1.5, size / 200)
    limit = 1.06 * max(np.abs(means).max(), extent or 0.0, 1e-6)
    legend_width = round(max(font.getlength(name) for name in names) + 1.6 * row)
    canvas = Image.new("RGB", (size + legend_width, size), "white")
    draw = ImageDraw.Draw(canvas)
    tick_labels = _draw_axes(draw, size, limit)
    if extent is not None:
        _dashed_square(draw, size, extent / limit)
    pixels = np.asarray(canvas, np.float64).copy()
    order = np.random.default_rng(0).permutation(len(means))
    places = (0.5 + means[order] * (1, -1) / (2 * limit)) * size
    for (x, y), label in zip(places, labels[order], strict=True):
        _add_dot(pixels[:, :size], x, y, radius, PALETTE[label])
    rows = size / 2 + (np.arange(num_classes) - (num_classes - 1) / 2) * row
    for y, colour in zip(rows, PALETTE, strict=False):
        _add_dot(pixels, size + 0.7 * row, y, 1.6 * radius, colour, opacity=1.0)
    canvas = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for y, name in zip(rows, names, strict=True):
        draw.text((size + 1.2 * row, y), name, INK, font, anchor="lm")
    for place, text, anchor in tick_labels:  # above the dots, with a halo, so that they stay legible
        draw.text(place, text, INK, small_font, anchor, stroke_width=max(2, size // 270), stroke_fill="white")
    return np.asarray(canvas)


def plane_picture(
    decode: Callable[[np.ndarray], np.ndarray],
    means: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    side: int = 20,
    extent: float = 2.0,
    size: int = 800,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """uint8 RGB [H, W, 3]: `latent_plane` with its coordinates on the left, `scatter` on the right, H about 1.1 size.

    Args:
        size: height of each of the two in pixels.
        The rest as for `latent_plane` and `scatter`; the dashed square in the scatter plot is the extent of the left picture.
    Raises:
        ValueError: an argument outside its range, or of another shape.
    """
    right = scatter(means, labels, num_classes, size, extent, names)
    left = _mosaic(latent_plane(decode, side, extent), size)
    font, title = ImageFont.load_default(size / 40), ImageFont.load_default(size / 28)
    margin = round(size * 0.07)
    canvas = Image.new("RGB", (2 * margin + size + right.shape[1], 2 * margin + size), "white")
    canvas.paste(left, (margin, margin))
    start = 2 * margin + size
    canvas.paste(Image.fromarray(right), (start, margin))
    draw = ImageDraw.Draw(canvas)
    for edge, text in ((margin, "Decoded latent plane"), (start, f"Posterior means of {len(means):,} images")):
        draw.text((edge + size / 2, margin / 2), text, INK, title, "mm")
    lowest, highest = NORMAL.cdf(-extent), NORMAL.cdf(extent)
    for value in np.linspace(-extent, extent, 5):
        index = (NORMAL.cdf(value) - lowest) / (highest - lowest) * (side - 1)
        place = (index + 0.5) / side * size
        draw.text((margin + place, size + 1.1 * margin), f"{value:g}", INK, font, "mt")
        draw.text((0.88 * margin, margin + size - place), f"{value:g}", INK, font, "rm")
    draw.text((margin + size / 2, size + 1.92 * margin), "z1", INK, font, "mb")
    draw.text((0.88 * margin, 0.75 * margin), "z2", INK, font, "rm")
    return np.asarray(canvas)


def _check_points(means, labels, num_classes, size, names):
    if means.ndim != 2 or means.shape[1] != 2 or not len(means) or not np.isfinite(means).all():
        raise ValueError(f"means have shape {means.shape}; they must be [N >= 1, 2], all finite")
    if labels.shape != means.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype}{list(labels.shape)}; there must be one integer for each of {len(means)} images"
        )
    if not 1 <= num_classes <= len(PALETTE):
        raise ValueError(
            f"num_classes is {num_classes}; it must lie in 1 to {len(PALETTE)}, the number of distinct colours: "
            "choose images of fewer classes, or merge classes"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} do not lie in [0, {num_classes})")
    if len(names) != num_classes:
        raise ValueError(f"there are {len(names)} names for {num_classes} classes; give one name per class")
    if size < SMALLEST:
        raise ValueError(f"size is {size}; it must be at least {SMALLEST} pixels")


def _draw_axes(draw, size, limit):
    """Draws both axes, ticks at a few round numbers and a frame; returns the tick labels [(place, text, anchor)]."""
    middle, tick, line = size / 2, size / 100, max(1, size // 500)
    draw.line([(0, middle), (size, middle)], AXIS, line)
    draw.line([(middle, 0), (middle, size)], AXIS, line)
    draw.rectangle([0, 0, size - 1, size - 1], outline=FRAME, width=line)
    labels = [((size - tick, middle - tick), "z1", "rb"), ((middle + tick, tick), "z2", "lt")]
    base = 10.0 ** np.floor(np.log10(limit))
    step = next(part * base for part in (0.2, 0.5, 1, 2) if limit < 5 * part * base)
    for number in range(1, int(0.93 * limit / step) + 1):
        for value in (-number * step, number * step):
            place = middle * (1 + value / limit)
            draw.line([(place, middle - tick), (place, middle + tick)], FRAME, line)
            draw.line([(middle - tick, size - place), (middle + tick, size - place)], FRAME, line)
            labels.append(((place, middle + 1.6 * tick), f"{value:g}", "mt"))
            labels.append(((middle - 1.8 * tick, size - place), f"{value:g}", "rm"))
    return labels


def _dashed_square(draw, size, share):
    """Draws the outline of the middle `share` of the picture."""
    low, high = (size * (1 + sign * share) / 2 for sign in (-1, 1))
    dash = size / 90
    for start in np.arange(low, high, 2 * dash):
        end = min(start + dash, high)
        for place in (low, high):
            draw.line([(start, place), (end, place)], FRAME, max(1, size // 500))
            draw.line([(place, start), (place, end)], FRAME, max(1, size // 500))


def _add_dot(pixels, x, y, radius, colour, opacity=OPACITY):
    """Blends one disc into float [H, W, 3] in place. A pixel is blended by its covered share, so edges are smooth."""
    top, left = (max(0, int(centre - radius - 1)) for centre in (y, x))
    patch = pixels[top : int(y + radius + 2), left : int(x + radius + 2)]
    rows, columns = np.ogrid[: patch.shape[0], : patch.shape[1]]
    distance = np.hypot(rows + top + 0.5 - y, columns + left + 0.5 - x)
    patch += opacity * np.clip(radius + 0.5 - distance, 0, 1)[..., None] * (colour - patch)


def _mosaic(images, size) -> Image.Image:
    """[side, side, H, W, C] -> a picture of size x size, with white lines between images."""
    side, _, height, width, channels = images.shape
    mosaic = images.transpose(0, 2, 1, 3, 4).reshape(side * height, side * width, channels)
    mosaic = np.broadcast_to(mosaic, (*mosaic.shape[:2], 3))
    enlarge = size >= max(mosaic.shape[:2])
    picture = Image.fromarray(mosaic).resize((size, size), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for index in range(1, side):
        place = round(index / side * size)
        draw.line([(place, 0), (place, size)], "white", 1)
        draw.line([(0, place), (size, place)], "white", 1)
    return picture
