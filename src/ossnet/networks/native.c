/* Loops that tensor operations cannot fuse: Pade units with what surrounds them, and gathering patches.

   Compiled on the user's machine when it has a C compiler (see native.py); everything here also exists as tensor
   operations in kernels.py, which tests compare with it. Plain C99 with OpenMP pragmas that a compiler without
   OpenMP may ignore. Arrays are contiguous unless a stride is given; sizes and strides count values, not bytes.

   P(x) = (c0 + c1 x + ... + c5 x^5) / (1 + c6 |x| + c7 |x|^2 + c8 |x|^3 + c9 |x|^4), c6 ... c9 >= 0 (SPEC 2). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef uint16_t bf16;

/* Work below this many values is done before a second thread has woken up. */
#define GRAIN 32768

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif

static inline float bf16_load(bf16 v) {
    uint32_t bits = (uint32_t)v << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* To the nearest, ties to even, as torch rounds; NaN stays NaN. */
static inline bf16 bf16_store(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline float f32_load(float v) { return v; }
static inline float f32_store(float x) { return x; }

static inline float top_of(float x, const float *c) {
    return c[0] + x * (c[1] + x * (c[2] + x * (c[3] + x * (c[4] + x * c[5]))));
}

static inline float bottom_of(float size, const float *c) {
    return 1.0f + size * (c[6] + size * (c[7] + size * (c[8] + size * c[9])));
}

/* Loops are written once and specialised by constants: a condition inside one would keep it from being vectorised. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* Rows of `columns` values, `stride` apart: out = P(x * scale + shift + skip). scale, skip: NULL for none. Every
   `per_volume` rows share one row of scale and shift. `out` may be x itself. */
#define AFFINE_PADE(NAME, T, LOAD, STORE)                                                                          \
    INLINE void NAME##_row(const T *x, const T *skip, const float *scale, const float *shift, T *out, i64 columns, \
                           const float *coefficients, const int scaled, const int skipped) {                       \
        float c[10];                                                                                               \
        memcpy(c, coefficients, sizeof c);                                                                         \
        _Pragma("omp simd") for (i64 i = 0; i < columns; i++) {                                                    \
            float z = LOAD(x[i]);                                                                                  \
            if (scaled) z *= scale[i];                                                                             \
            z += shift[i];                                                                                         \
            if (skipped) z += LOAD(skip[i]);                                                                       \
            out[i] = STORE(top_of(z, c) / bottom_of(fabsf(z), c));                                                 \
        }                                                                                                          \
    }                                                                                                              \
    EXPORT void NAME(const T *x, const T *skip, const float *scale, const float *shift, T *out, i64 rows,          \
                     i64 columns, i64 stride, i64 per_volume, const float *coefficients, int threads) {            \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1 && rows * columns > GRAIN) schedule(static)") \
        for (i64 row = 0; row < rows; row++) {                                                                     \
            const i64 at = row * stride, volume = (row / per_volume) * columns;                                    \
            if (scale && skip)                                                                                     \
                NAME##_row(x + at, skip + at, scale + volume, shift + volume, out + at, columns, coefficients, 1,  \
                           1);                                                                                     \
            else if (scale)                                                                                        \
                NAME##_row(x + at, NULL, scale + volume, shift + volume, out + at, columns, coefficients, 1, 0);   \
            else if (skip)                                                                                         \
                NAME##_row(x + at, skip + at, NULL, shift + volume, out + at, columns, coefficients, 0, 1);        \
            else                                                                                                   \
                NAME##_row(x + at, NULL, NULL, shift + volume, out + at, columns, coefficients, 0, 0);             \
        }                                                                                                          \
    }

AFFINE_PADE(ossnet_affine_pade_f32, float, f32_load, f32_store)
AFFINE_PADE(ossnet_affine_pade_bf16, bf16, bf16_load, bf16_store)

/* P of `count` values one after the other. */
#define PADE(NAME, T, LOAD, STORE)                                                                                 \
    EXPORT void NAME(const T *x, T *out, i64 count, const float *coefficients, int threads) {                      \
        const i64 part = 1 << 14;                                                                                  \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1 && count > GRAIN) schedule(static)")         \
        for (i64 start = 0; start < count; start += part) {                                                        \
            float c[10];                                                                                           \
            memcpy(c, coefficients, sizeof c);                                                                     \
            const i64 stop = start + part < count ? start + part : count;                                          \
            _Pragma("omp simd") for (i64 i = start; i < stop; i++) {                                               \
                float z = LOAD(x[i]);                                                                              \
                out[i] = STORE(top_of(z, c) / bottom_of(fabsf(z), c));                                             \
            }                                                                                                      \
        }                                                                                                          \
    }

PADE(ossnet_pade_f32, float, f32_load, f32_store)
PADE(ossnet_pade_bf16, bf16, bf16_load, bf16_store)

/* Gradients of y = P(x * scale + shift + skip), given that of y. scale with shift, and skip: NULL for none.
   d_x; d_skip (the gradient of the sum in brackets, with skip only); d_scale, d_shift (volumes, columns) and
   d_coefficients (10), in double, are added to. Returns 1 without memory. */
#define AFFINE_PADE_BACKWARD(NAME, T, LOAD, STORE)                                                                 \
    INLINE void NAME##_row(const T *g, const T *x, const T *skip, const float *scale, const float *shift, T *d_x,  \
                           T *d_skip, float *d_scale, float *d_shift, double *d_coefficients, i64 columns,         \
                           const float *coefficients, const int scaled, const int skipped) {                       \
        float n0 = 0, n1 = 0, n2 = 0, n3 = 0, n4 = 0, n5 = 0, d0 = 0, d1 = 0, d2 = 0, d3 = 0;                      \
        float c[10];                                                                                               \
        memcpy(c, coefficients, sizeof c);                                                                         \
        _Pragma("omp simd reduction(+ : n0, n1, n2, n3, n4, n5, d0, d1, d2, d3)")                                  \
        for (i64 i = 0; i < columns; i++) {                                                                        \
            float value = LOAD(x[i]);                                                                              \
            float z = value;                                                                                       \
            if (scaled) z = value * scale[i] + shift[i];                                                           \
            if (skipped) z += LOAD(skip[i]);                                                                       \
            float size = fabsf(z), sign = (z > 0 ? 1.0f : 0.0f) - (z < 0 ? 1.0f : 0.0f);                           \
            float over = 1.0f / bottom_of(size, c);                                                                \
            float p = top_of(z, c) * over;                                                                         \
            float slope = c[1] + z * (2 * c[2] + z * (3 * c[3] + z * (4 * c[4] + z * (5 * c[5]))));                \
            float fall = c[6] + size * (2 * c[7] + size * (3 * c[8] + size * (4 * c[9])));                         \
            float weight = LOAD(g[i]) * over;                                                                      \
            float dz = weight * (slope - p * sign * fall);                                                         \
            float z2 = z * z, down = -weight * p * size;                                                           \
            n0 += weight;                                                                                          \
            n1 += weight * z;                                                                                      \
            n2 += weight * z2;                                                                                     \
            n3 += weight * z2 * z;                                                                                 \
            n4 += weight * z2 * z2;                                                                                \
            n5 += weight * z2 * z2 * z;                                                                            \
            d0 += down;                                                                                            \
            d1 += down * size;                                                                                     \
            d2 += down * z2;                                                                                       \
            d3 += down * z2 * size;                                                                                \
            d_x[i] = STORE(scaled ? dz * scale[i] : dz);                                                           \
            if (skipped) d_skip[i] = STORE(dz);                                                                    \
            if (scaled) {                                                                                          \
                d_scale[i] += dz * value;                                                                          \
                d_shift[i] += dz;                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
        const double sums[10] = {n0, n1, n2, n3, n4, n5, d0, d1, d2, d3};                                          \
        for (int i = 0; i < 10; i++) d_coefficients[i] += sums[i];                                                 \
    }                                                                                                              \
    EXPORT int NAME(const T *gradient, const T *x, const T *skip, const float *scale, const float *shift, T *d_x,  \
                    T *d_skip, double *d_scale, double *d_shift, double *d_coefficients, i64 volumes,              \
                    i64 per_volume, i64 columns, const float *coefficients, int threads) {                         \
        /* Sums of a few hundred rows in float, those in double: about as exact as pairwise sums. */               \
        const i64 block = 256, blocks = (per_volume + block - 1) / block;                                          \
        int failed = 0;                                                                                            \
        _Pragma("omp parallel num_threads(threads) if (threads > 1 && volumes * per_volume * columns > GRAIN)") {   \
            float *sums = malloc(2 * (size_t)columns * sizeof(float));                                             \
            if (!sums) {                                                                                           \
                _Pragma("omp atomic write") failed = 1;                                                            \
            }                                                                                                      \
            _Pragma("omp for schedule(static, 1) ordered") for (i64 job = 0; job < volumes * blocks; job++) {      \
                double local[10] = {0};                                                                            \
                const i64 volume = job / blocks, first = (job % blocks) * block;                                   \
                const i64 last = first + block < per_volume ? first + block : per_volume;                          \
                const float *s = scale ? scale + volume * columns : NULL;                                          \
                const float *t = scale ? shift + volume * columns : NULL;                                          \
                if (sums) {                                                                                        \
                    memset(sums, 0, 2 * (size_t)columns * sizeof(float));                                          \
                    for (i64 row = volume * per_volume + first; row < volume * per_volume + last; row++) {         \
                        const i64 at = row * columns;                                                              \
                        if (scale && skip)                                                                         \
                            NAME##_row(gradient + at, x + at, skip + at, s, t, d_x + at, d_skip + at, sums,        \
                                       sums + columns, local, columns, coefficients, 1, 1);                        \
                        else if (scale)                                                                            \
                            NAME##_row(gradient + at, x + at, NULL, s, t, d_x + at, NULL, sums, sums + columns,    \
                                       local, columns, coefficients, 1, 0);                                        \
                        else                                                                                       \
                            NAME##_row(gradient + at, x + at, NULL, NULL, NULL, d_x + at, NULL, NULL, NULL,        \
                                       local, columns, coefficients, 0, 0);                                        \
                    }                                                                                              \
                }                                                                                                  \
                /* In order, so that the sum does not depend on which thread comes first. */                       \
                _Pragma("omp ordered") {                                                                           \
                    for (int i = 0; i < 10; i++) d_coefficients[i] += local[i];                                    \
                    if (sums && scale)                                                                             \
                        for (i64 i = 0; i < columns; i++) {                                                        \
                            d_scale[volume * columns + i] += sums[i];                                              \
                            d_shift[volume * columns + i] += sums[columns + i];                                    \
                        }                                                                                          \
                }                                                                                                  \
            }                                                                                                      \
            free(sums);                                                                                            \
        }                                                                                                          \
        return failed;                                                                                             \
    }

AFFINE_PADE_BACKWARD(ossnet_affine_pade_backward_f32, float, f32_load, f32_store)
AFFINE_PADE_BACKWARD(ossnet_affine_pade_backward_bf16, bf16, bf16_load, bf16_store)

/* A cube of `edge` voxels an axis from `corner`, (channels, edge, edge, edge), zero outside of the volume. */
INLINE void cube(const float *image, const i64 *shape, const i64 *strides, const i64 *corner, const i64 edge,
                 float *out) {
    const i64 low = corner[2] < 0 ? -corner[2] : 0;
    const i64 high = shape[3] - corner[2] < edge ? shape[3] - corner[2] : edge;
    const int whole = low == 0 && high == edge && strides[3] == 1;
    for (i64 c = 0; c < shape[0]; c++)
        for (i64 i = 0; i < edge; i++)
            for (i64 j = 0; j < edge; j++, out += edge) {
                const i64 x = corner[0] + i, y = corner[1] + j;
                if (x < 0 || x >= shape[1] || y < 0 || y >= shape[2] || low >= high) {
                    memset(out, 0, (size_t)edge * sizeof(float));
                    continue;
                }
                const float *from = image + c * strides[0] + x * strides[1] + y * strides[2] + corner[2] * strides[3];
                if (whole) {
                    memcpy(out, from, (size_t)edge * sizeof(float));
                } else {
                    for (i64 k = 0; k < edge; k++) out[k] = k >= low && k < high ? from[k * strides[3]] : 0.0f;
                }
            }
}

/* Between voxels along one axis of (before, from, after): position i lies between i * step and the next. */
INLINE void between(const float *in, float *out, const i64 before, const i64 from, const i64 step, const i64 after,
                    const float f) {
    for (i64 b = 0; b < before; b++)
        for (i64 i = 0; i < 7; i++) {
            const float *low = in + (b * from + i * step) * after, *high = low + after;
            float *to = out + (b * 7 + i) * after;
            for (i64 a = 0; a < after; a++) to[a] = low[a] + f * (high[a] - low[a]);
        }
}

/* (edge)^3 voxels pooled in 2^3 to (width)^3, moving by `hop` voxels; by average, or by maximum. */
INLINE void pool_cube(const float *in, float *out, const i64 edge, const i64 width, const i64 hop, const int maximum) {
    float lines[15];
    for (i64 i = 0; i < width; i++)
        for (i64 j = 0; j < width; j++) {
            const float *v = in + (i * edge + j) * hop * edge;
            const float *w = v + edge * edge;
            for (i64 k = 0; k < edge; k++)
                lines[k] = maximum ? fmaxf(fmaxf(v[k], v[edge + k]), fmaxf(w[k], w[edge + k]))
                                   : v[k] + v[edge + k] + w[k] + w[edge + k];
            for (i64 k = 0; k < width; k++)
                *out++ = maximum ? fmaxf(lines[k * hop], lines[k * hop + 1])
                                 : (lines[k * hop] + lines[k * hop + 1]) * 0.125f;
        }
}

/* One 7^3 patch a channel into out (channels, 343). Small (pool = 0): every voxel of p-3 ... p+3. Large: the
   14^3 voxels of p-7 ... p+6, pooled in 2^3 by average (1) or maximum (2). scratch: 2 * channels * 15^3. */
static void patch(const float *image, const i64 *shape, const i64 *strides, const i64 *voxel, const float *fraction,
                  int pool, float *scratch, float *out) {
    const i64 channels = shape[0], before = pool ? 7 : 3;
    const int off = fraction[0] != 0 || fraction[1] != 0 || fraction[2] != 0;
    const i64 corner[3] = {voxel[0] - before, voxel[1] - before, voxel[2] - before};
    float *wide = scratch, *other = scratch + channels * 15 * 15 * 15;
    if (!pool && !off) {
        cube(image, shape, strides, corner, 7, out);
    } else if (!pool) {
        cube(image, shape, strides, corner, 8, wide);
        between(wide, other, channels, 8, 1, 64, fraction[0]);
        between(other, wide, channels * 7, 8, 1, 8, fraction[1]);
        between(wide, out, channels * 49, 8, 1, 1, fraction[2]);
    } else if (!off) {
        cube(image, shape, strides, corner, 14, wide);
        for (i64 c = 0; c < channels; c++) {
            const float *from = wide + c * 14 * 14 * 14;
            if (pool == 1)
                pool_cube(from, out + c * 343, 14, 7, 2, 0);
            else
                pool_cube(from, out + c * 343, 14, 7, 2, 1);
        }
    } else {
        /* The pool moves by single voxels, so that its values can be interpolated. */
        cube(image, shape, strides, corner, 15, wide);
        for (i64 c = 0; c < channels; c++) {
            const float *from = wide + c * 15 * 15 * 15;
            if (pool == 1)
                pool_cube(from, other + c * 14 * 14 * 14, 15, 14, 1, 0);
            else
                pool_cube(from, other + c * 14 * 14 * 14, 15, 14, 1, 1);
        }
        between(other, wide, channels, 14, 2, 196, fraction[0]);
        between(wide, other, channels * 7, 14, 2, 14, fraction[1]);
        between(other, out, channels * 49, 14, 2, 1, fraction[2]);
    }
}

static void location(const float *p, i64 *voxel, float *fraction) {
    for (int a = 0; a < 3; a++) {
        float low = floorf(p[a]);
        voxel[a] = (i64)low;
        fraction[a] = p[a] - low;
    }
}

/* Patches of `count` locations (float voxel indices inside the volume) as rows of (parts * channels, 343) values,
   `stride` apart. pools: for each part what `patch` takes. `half` rounds to bfloat16. Returns 1 without memory. */
EXPORT int ossnet_patches(const float *image, const i64 *shape, const i64 *strides, const float *locations, i64 count,
                          const int *pools, i64 parts, void *out, i64 stride, int half, int threads) {
    const i64 channels = shape[0], values = channels * 343;
    int failed = 0;
    _Pragma("omp parallel num_threads(threads) if (threads > 1 && count * values > GRAIN)") {
        float *scratch = malloc((size_t)(2 * channels * 15 * 15 * 15 + values) * sizeof(float));
        float *row = scratch + 2 * channels * 15 * 15 * 15;
        if (!scratch) {
            _Pragma("omp atomic write") failed = 1;
        }
        _Pragma("omp for schedule(static)") for (i64 n = 0; n < count; n++) {
            if (!scratch) continue;
            i64 voxel[3];
            float fraction[3];
            location(locations + 3 * n, voxel, fraction);
            for (i64 part = 0; part < parts; part++) {
                if (half) {
                    bf16 *to = (bf16 *)out + n * stride + part * values;
                    patch(image, shape, strides, voxel, fraction, pools[part], scratch, row);
                    _Pragma("omp simd") for (i64 i = 0; i < values; i++) to[i] = bf16_store(row[i]);
                } else {
                    float *to = (float *)out + n * stride + part * values;
                    patch(image, shape, strides, voxel, fraction, pools[part], scratch, to);
                }
            }
        }
        free(scratch);
    }
    return failed;
}

/* The same patches (channels, 7, 49), taken to 14 combinations of their 7 planes: out (14, count, parts * channels
   * 49), planes of `plane` values and rows of `stride`. transform: (14, 7). */
EXPORT int ossnet_patch_spectra(const float *image, const i64 *shape, const i64 *strides, const float *locations,
                                i64 count, const int *pools, i64 parts, const float *transform, float *out, i64 plane,
                                i64 stride, int threads) {
    const i64 channels = shape[0], values = channels * 343;
    int failed = 0;
    _Pragma("omp parallel num_threads(threads) if (threads > 1 && count * values > GRAIN)") {
        float *scratch = malloc((size_t)(2 * channels * 15 * 15 * 15 + values) * sizeof(float));
        float *row = scratch + 2 * channels * 15 * 15 * 15;
        if (!scratch) {
            _Pragma("omp atomic write") failed = 1;
        }
        _Pragma("omp for schedule(static)") for (i64 n = 0; n < count; n++) {
            if (!scratch) continue;
            i64 voxel[3];
            float fraction[3];
            location(locations + 3 * n, voxel, fraction);
            for (i64 part = 0; part < parts; part++) {
                patch(image, shape, strides, voxel, fraction, pools[part], scratch, row);
                for (i64 c = 0; c < channels; c++) {
                    const float *v = row + c * 343;
                    for (i64 f = 0; f < 14; f++) {
                        const float *w = transform + f * 7;
                        float *to = out + f * plane + n * stride + (part * channels + c) * 49;
                        _Pragma("omp simd") for (i64 i = 0; i < 49; i++)
                            to[i] = w[0] * v[i] + w[1] * v[49 + i] + w[2] * v[98 + i] + w[3] * v[147 + i] +
                                    w[4] * v[196 + i] + w[5] * v[245 + i] + w[6] * v[294 + i];
                    }
                }
            }
        }
        free(scratch);
    }
    return failed;
}

/* Back from 14 combinations to 7 planes, plus bias, through P: from (14, count, channels * 49) to rows of
   (channels, 343), `stride` apart. transform: (7, 14); bias: (channels). */
EXPORT void ossnet_spectra_pade(const float *in, i64 plane, i64 in_stride, i64 count, i64 channels,
                                const float *transform, const float *bias, const float *coefficients, float *out,
                                i64 stride, int threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1 && count * channels * 343 > GRAIN) schedule(static)")
    for (i64 n = 0; n < count; n++) {
        float c[10];
        memcpy(c, coefficients, sizeof c);
        for (i64 channel = 0; channel < channels; channel++) {
            const float *from = in + n * in_stride + channel * 49;
            for (i64 v = 0; v < 7; v++) {
                const float *w = transform + v * 14;
                float *to = out + n * stride + channel * 343 + v * 49;
                _Pragma("omp simd") for (i64 i = 0; i < 49; i++) {
                    float z = bias[channel];
                    for (int f = 0; f < 14; f++) z += w[f] * from[f * plane + i];
                    to[i] = top_of(z, c) / bottom_of(fabsf(z), c);
                }
            }
        }
    }
}
