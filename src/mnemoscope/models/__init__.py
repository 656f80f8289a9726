"""WHO is audited: targets, their conditions and samplers, and the one denoising loop.

Import from the modules (``models.load.load``, ``models.watch.watch``, ``models.sampling.denoise``): nothing is imported here, so
that the closed-form models of ``models.gaussian`` and ``models.mixture`` open without diffusers.
"""
