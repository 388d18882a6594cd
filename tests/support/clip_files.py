"""Small clips as files for the tests of clip sources."""

import io

import numpy as np
from PIL import Image


def moving(frames=6, height=10, width=12, seed=0):
    """uint8 [F, H, W, 3]: frame f has the grey level 6 f, and a bright column at x = f."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    for frame in range(frames):
        clip[frame] = 6 * frame
        clip[frame, :, frame % width] = 250 - seed
    return clip


def animation(clip, kind="WEBP", milliseconds=120):
    """The bytes of an animated WebP (lossless) or GIF; milliseconds may be one for each frame."""
    file = io.BytesIO()
    first, *others = [Image.fromarray(frame) for frame in clip]
    extra = {"lossless": True} if kind == "WEBP" else {"disposal": 1}
    first.save(file, kind, save_all=True, append_images=others, duration=milliseconds, loop=0, **extra)
    return file.getvalue()


def film(clip, codec="ffv1", fps=8, kind="matroska", times=None, rotation=None, options=None):
    """The bytes of a video file; needs PyAV. times: of the frames, in units of 1 / fps."""
    import fractions

    import av

    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 1000 * fps)
        for number, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = round(1000 * (number if times is None else times[number]))
            frame.time_base = fractions.Fraction(1, 1000 * fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def sound(seconds=0.2):
    """The bytes of a file with sound and no picture; needs PyAV."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, int(8000 * seconds)), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
