"""What ``jax.export`` must be told about this package's custom calls."""

from jax import export

from . import _ffi


def export_disabled_checks() -> list[export.DisabledSafetyCheck]:
    """The ``disabled_checks`` that let ``jax.export.export`` serialise programs with this package's calls.

    JAX serialises no custom call unless someone vouches for it. This package does: a target's name ends in
    its version, and a target that has been released keeps its operands, attributes and meaning.

    The process that runs the artefact must ``import jax_trirun`` first, which registers the targets; for
    CUDA it must be an installation with the CUDA module if the one that exported was.

    Example:
        >>> from jax import export
        >>> exported = export.export(
        ...     jax.jit(jax_trirun.matmul), platforms=("cpu", "tpu"),
        ...     disabled_checks=jax_trirun.export_disabled_checks(),
        ... )(x, qw)
        >>> data = exported.serialize()  # needs the package flatbuffers
    """
    targets = (_ffi.MATMUL_TARGET, _ffi.DEQUANTIZE_TARGET, _ffi.PACK_TARGET, _ffi.UNPACK_TARGET)
    return [export.DisabledSafetyCheck.custom_call(target) for target in targets]
