"""What the kernels of a GPU compute, in plain jax: stands in for them where an interpreter takes too long, to
test all that surrounds them on many shapes and on meshes."""

import jax.numpy as jnp

from shardtrain.kernels.winograd.cook_toom import matrix

LANES = 128
FUSED = {2: (64, 64), 4: (64, 64), 16: (64, 16)}


def tile_sizes(rows, columns, dtype):
    return (128 if rows > 64 else 64), (128 if columns % 128 == 0 else 64), 128 // jnp.dtype(dtype).itemsize


def together(tile_in, tile_out, step, dtype):
    return 8 if max(*tile_in, *tile_out) <= 6 else 4


def transform(x, *, rows, steps, tiles, strips, count, interpreted):
    assert x.shape[3] % LANES == 0
    assert tiles[1] % count == 0
    down, across = (matrix(r) for r in rows)
    last = (tiles[0] - 1) * steps[0] + 1
    cut = jnp.stack([x[:, i : i + last : steps[0]] for i in range(down.shape[1])], 1)
    # (batch, i, tile, columns, channels)
    last = (tiles[1] - 1) * steps[1] + 1
    cut = jnp.stack([cut[:, :, :, j : j + last : steps[1]] for j in range(across.shape[1])], 2)
    v = jnp.einsum("pi,qj,nijabc->pqnabc", down, across, cut.astype(jnp.float32))
    v = v.reshape(len(down) * len(across), -1, tiles[1], x.shape[3]).astype(x.dtype)
    return jnp.pad(v, ((0, 0), (0, strips - v.shape[1]), (0, 0), (0, 0)))


def untransform(m, bias, *, rows, tiles, batch, count, relu, out_type, interpreted):
    down, across = (matrix(r) for r in rows)
    m = m[:, : batch * tiles[0]].astype(jnp.float32)
    m = m.reshape(down.shape[1], across.shape[1], batch, *tiles, -1)
    y = jnp.einsum("si,tj,ijnabc->nasbtc", down, across, m)
    y = y.reshape(batch, tiles[0] * len(down), tiles[1] * len(across), -1)
    y = y if bias is None else y + bias
    return (jnp.maximum(y, 0) if relu else y).astype(out_type)


def multiply_and_untransform(v, u, *, rows, out_type, interpreted):
    down, across = (matrix(r) for r in rows)
    bm, bn = FUSED[len(down) * len(across)]
    assert v.shape[1] % bm == 0
    assert u.shape[2] % bn == 0
    m = jnp.einsum("xpc,xck->xpk", v, u, preferred_element_type=jnp.float32)
    m = m.reshape(down.shape[1], across.shape[1], *m.shape[1:])
    y = jnp.einsum("si,tj,ijpk->stpk", down, across, m)
    return y.reshape(-1, *y.shape[2:]).astype(out_type)


def matmul(a, b, *, transpose_a=False, precision=None, out_type, interpreted):
    del precision, interpreted
    return jnp.einsum("bkm,bkn->bmn" if transpose_a else "bmk,bkn->bmn", a, b).astype(out_type)
