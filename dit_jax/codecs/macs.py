"""Multiply-adds of the KL autoencoder, counted from its sizes."""


def gmacs(codec, resolution):
    """(encode, decode) in GMACs for one square image: convolutions, linears and both attention products.

    136.4 and 311.1 for the Stable Diffusion codec at 256 px. Norms and activations do not count; products with zero padding do.
    XLA's own count excludes the latter and is slightly lower (-1.2 % at 256 px).

    Args:
        codec: a `KLVAE`.
        resolution: side of the image in pixels, a multiple of codec.downsample, else ValueError.
    """
    grid, _, _ = codec.latent_shape(resolution)
    widths, latent = codec.block_out_channels, codec.latent_channels
    deepest, tokens = widths[-1], grid * grid
    middle = 2 * _resnet(deepest, deepest, grid) + 4 * tokens * deepest**2 + 2 * tokens**2 * deepest

    encode = _conv(codec.image_channels, widths[0], resolution) + middle + _conv(deepest, 2 * latent, grid)
    decode = _conv(latent, deepest, grid) + middle + _conv(widths[0], codec.image_channels, resolution)
    if codec.use_quant_conv:
        encode += _conv(2 * latent, 2 * latent, grid, kernel_size=1)
        decode += _conv(latent, latent, grid, kernel_size=1)

    for level, width in enumerate(widths):
        side = resolution >> level
        finer, coarser = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
        encode += _resnet(finer, width, side) + (codec.layers_per_block - 1) * _resnet(width, width, side)
        decode += _resnet(coarser, width, side) + codec.layers_per_block * _resnet(width, width, side)
        if level < len(widths) - 1:
            encode += _conv(width, width, side // 2)
        if level > 0:
            decode += _conv(width, width, 2 * side)
    return encode / 1e9, decode / 1e9


def _conv(inputs, outputs, side, kernel_size=3):
    """MACs of a convolution with `side` x `side` outputs."""
    return kernel_size**2 * inputs * outputs * side * side


def _resnet(inputs, outputs, side):
    shortcut = _conv(inputs, outputs, side, kernel_size=1) if inputs != outputs else 0
    return _conv(inputs, outputs, side) + _conv(outputs, outputs, side) + shortcut
