// Kernels over rows of {{ element }} elements, {{ pack }} at a time; generated from templates/kernels/rows.cu.
// Arithmetic is in float, rounded once where a result is stored. Indices are 64 bits wide.

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

#define PACK {{ pack }}
#define STEPS {{ steps }}
#define WARP 32
#define NEGATIVE_INFINITY __int_as_float((int)0xff800000)

{% match element %}
{% when Element::Bf16 %}
typedef u16 T;
__device__ __forceinline__ float up(T x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ T down(float x) { T y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
{% when Element::F16 %}
typedef u16 T;
__device__ __forceinline__ float up(T x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ __forceinline__ T down(float x) { T y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
{% when Element::F32 %}
typedef float T;
__device__ __forceinline__ float up(T x) { return x; }
__device__ __forceinline__ T down(float x) { return x; }
{% endmatch %}

// Neighbouring elements, read and written at once.
struct __align__(PACK * sizeof(T)) Pack { T x[PACK]; };

__device__ __forceinline__ void read(float* to, const T* from) {
    Pack p = *(const Pack*)from;
    #pragma unroll
    for (int j = 0; j < PACK; j++) to[j] = up(p.x[j]);
}

__device__ __forceinline__ void write(T* to, const float* from) {
    Pack p;
    #pragma unroll
    for (int j = 0; j < PACK; j++) p.x[j] = down(from[j]);
    *(Pack*)to = p;
}

// The sum over all threads of a block, in all of them; the order does not depend on timing.
__device__ float block_sum(float x) {
    __shared__ float parts[WARP];
    #pragma unroll
    for (int k = WARP / 2; k > 0; k /= 2) x += __shfl_xor_sync(0xffffffffu, x, k);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.f;
    for (int w = 0; w < blockDim.x / WARP; w++) sum += parts[w];
    return sum;
}

// Row i of a tensor [.., n] whose leading dims are b x h x t with these strides.
struct Rows { i64 h, t, sb, sh, st; };
__device__ __forceinline__ i64 row_at(Rows r, i64 i) {
    i64 t = i % r.t, rest = i / r.t;
    return rest / r.h * r.sb + rest % r.h * r.sh + t * r.st;
}

// ---- RMSNorm and LayerNorm: y = alpha h + beta, h = (x - mean) r, r = 1 / sqrt(mean((x - mean)^2) + eps); mean = 0 for RMSNorm

__device__ __forceinline__ float normalise(float x[STEPS][PACK], i64 n, float eps, int remove_mean) {
    if (remove_mean) {
        float s = 0.f;
        #pragma unroll
        for (int k = 0; k < STEPS; k++)
            #pragma unroll
            for (int j = 0; j < PACK; j++) s += x[k][j];
        float mean = block_sum(s) / n;
        #pragma unroll
        for (int k = 0; k < STEPS; k++) {
            bool in = (k * (i64)blockDim.x + threadIdx.x) * PACK < n;
            #pragma unroll
            for (int j = 0; j < PACK; j++) x[k][j] = in ? x[k][j] - mean : 0.f;
        }
    }
    float q = 0.f;
    #pragma unroll
    for (int k = 0; k < STEPS; k++)
        #pragma unroll
        for (int j = 0; j < PACK; j++) q += x[k][j] * x[k][j];
    float r = rsqrtf(block_sum(q) / n + eps);
    #pragma unroll
    for (int k = 0; k < STEPS; k++)
        #pragma unroll
        for (int j = 0; j < PACK; j++) x[k][j] *= r;
    return r;
}

__device__ __forceinline__ void read_row(float x[STEPS][PACK], const T* from, i64 n) {
    #pragma unroll
    for (int k = 0; k < STEPS; k++) {
        i64 at = (k * (i64)blockDim.x + threadIdx.x) * PACK;
        if (at < n) read(x[k], from + at);
        else
            #pragma unroll
            for (int j = 0; j < PACK; j++) x[k][j] = 0.f;
    }
}

extern "C" __global__ void norm_forward(const T* x, const T* alpha, const T* beta, T* y, i64 n, float eps, int remove_mean) {
    float h[STEPS][PACK];
    x += blockIdx.x * n;
    y += blockIdx.x * n;
    read_row(h, x, n);
    normalise(h, n, eps, remove_mean);
    #pragma unroll
    for (int k = 0; k < STEPS; k++) {
        i64 at = (k * (i64)blockDim.x + threadIdx.x) * PACK;
        if (at >= n) continue;
        float a[PACK], b[PACK];
        read(a, alpha + at);
        if (beta) read(b, beta + at);
        #pragma unroll
        for (int j = 0; j < PACK; j++) a[j] = beta ? h[k][j] * a[j] + b[j] : h[k][j] * a[j];
        write(y + at, a);
    }
}

// dx = r (g - [mean(g)] - h mean(g h)) with g = dy alpha; sums over this block's rows of dy h and dy go to `partial` [2, blocks, n].
extern "C" __global__ void norm_backward(const T* x, const T* alpha, const T* dy, T* dx, float* partial, i64 rows, i64 n, float eps,
                                         int remove_mean) {
    float da[STEPS][PACK], db[STEPS][PACK], a[STEPS][PACK];
    #pragma unroll
    for (int k = 0; k < STEPS; k++)
        #pragma unroll
        for (int j = 0; j < PACK; j++) da[k][j] = db[k][j] = 0.f;
    read_row(a, alpha, n);
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        float h[STEPS][PACK], g[STEPS][PACK];
        read_row(h, x + row * n, n);
        read_row(g, dy + row * n, n);
        float r = normalise(h, n, eps, remove_mean);
        float sum = 0.f, product = 0.f;
        #pragma unroll
        for (int k = 0; k < STEPS; k++)
            #pragma unroll
            for (int j = 0; j < PACK; j++) {
                da[k][j] += g[k][j] * h[k][j];
                db[k][j] += g[k][j];
                g[k][j] *= a[k][j];
                sum += g[k][j];
                product += g[k][j] * h[k][j];
            }
        product = block_sum(product) / n;
        sum = remove_mean ? block_sum(sum) / n : 0.f;
        #pragma unroll
        for (int k = 0; k < STEPS; k++) {
            i64 at = (k * (i64)blockDim.x + threadIdx.x) * PACK;
            if (at >= n) continue;
            #pragma unroll
            for (int j = 0; j < PACK; j++) g[k][j] = r * (g[k][j] - sum - h[k][j] * product);
            write(dx + row * n + at, g[k]);
        }
    }
    float* to = partial + blockIdx.x * n;
    #pragma unroll
    for (int k = 0; k < STEPS; k++) {
        i64 at = (k * (i64)blockDim.x + threadIdx.x) * PACK;
        if (at >= n) continue;
        #pragma unroll
        for (int j = 0; j < PACK; j++) {
            to[at + j] = da[k][j];
            to[gridDim.x * n + at + j] = db[k][j];
        }
    }
}

// Sums `count` rows of n floats, in their order.
extern "C" __global__ void sum_rows(const float* from, T* to, i64 count, i64 n) {
    i64 at = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (at >= n) return;
    float sum = 0.f;
    for (i64 i = 0; i < count; i++) sum += from[i * n + at];
    to[at] = down(sum);
}

// ---- SiLU: y = x s, s = 1 / (1 + exp(-x)); dx = dy s (1 + x (1 - s))

extern "C" __global__ void silu_forward(const T* x, T* y, i64 count) {
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK];
        read(v, x + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) v[j] = v[j] / (1.f + __expf(-v[j]));
        write(y + i, v);
    }
}

extern "C" __global__ void silu_backward(const T* x, const T* dy, T* dx, i64 count) {
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK], g[PACK];
        read(v, x + i);
        read(g, dy + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) {
            float s = 1.f / (1.f + __expf(-v[j]));
            g[j] *= s * (1.f + v[j] * (1.f - s));
        }
        write(dx + i, g);
    }
}

// ---- Casts to and from float, and a sum in float.

__device__ __forceinline__ void write_floats(float* to, const float* from) {
    #pragma unroll
    for (int j = 0; j < PACK; j += 4) {
        if (PACK % 4 == 0) *(float4*)(to + j) = make_float4(from[j], from[j + 1], from[j + 2], from[j + 3]);
        else to[j] = from[j];
    }
}

extern "C" __global__ void widen(const T* x, float* y, i64 count) {
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK + 3];
        read(v, x + i);
        write_floats(y + i, v);
    }
}

extern "C" __global__ void narrow(const float* x, T* y, i64 count) {
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK];
        #pragma unroll
        for (int j = 0; j < PACK; j++) v[j] = x[i + j];
        write(y + i, v);
    }
}

extern "C" __global__ void add_wide(const T* a, const T* b, float* y, i64 count) {
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK + 3], w[PACK];
        read(v, a + i);
        read(w, b + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) v[j] += w[j];
        write_floats(y + i, v);
    }
}

// ---- Sums, products, and the gated activation y = x s b, s = 1 / (1 + exp(-x)); dx = dy b s (1 + x (1 - s)), db = dy x s.
// A result may be an operand: each element is read before it is written.

extern "C" __global__ void add(const T* a, const T* b, T* y, i64 count) {
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK], w[PACK];
        read(v, a + i);
        read(w, b + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) v[j] += w[j];
        write(y + i, v);
    }
}

extern "C" __global__ void mul(const T* a, const T* b, T* y, i64 count) {
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK], w[PACK];
        read(v, a + i);
        read(w, b + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) v[j] *= w[j];
        write(y + i, v);
    }
}

extern "C" __global__ void gated_forward(const T* x, const T* b, T* y, i64 count) {
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK], w[PACK];
        read(v, x + i);
        read(w, b + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) v[j] = v[j] / (1.f + __expf(-v[j])) * w[j];
        write(y + i, v);
    }
}

extern "C" __global__ void gated_backward(const T* x, const T* b, const T* dy, T* dx, T* db, i64 count) {
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK], w[PACK], g[PACK];
        read(v, x + i);
        read(w, b + i);
        read(g, dy + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) {
            float s = 1.f / (1.f + __expf(-v[j]));
            w[j] *= g[j] * s * (1.f + v[j] * (1.f - s));
            g[j] *= v[j] * s;
        }
        write(dx + i, w);
        write(db + i, g);
    }
}

// ---- Rotary positions: pairs (i, i + d/2), or (2i, 2i + 1) if interleaved, turned by the angle of their row; sign -1 turns back.
// x is [b, h, t, d] with the strides `rows`, y is contiguous; tables are [t, d/2], one for each b if `batch_step` is not 0.

extern "C" __global__ void rope(const T* x, const T* cosine, const T* sine, T* y, Rows rows, i64 count, int half, i64 cosine_step,
                                i64 sine_step, int interleaved, int sequence_first, float sign) {
    int packs = half / PACK;
    i64 id = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (id >= count * packs) return;
    i64 row = id / packs;
    int i = (int)(id % packs) * PACK;
    i64 rest = row / rows.t, batch = rest / rows.h;
    i64 position = sequence_first ? rest % rows.h : row % rows.t;
    const T* from = x + row_at(rows, row);
    T* to = y + row * 2 * half;
    float c[PACK], s[PACK], a[PACK], b[PACK];
    read(c, cosine + batch * cosine_step + position * half + i);
    read(s, sine + batch * sine_step + position * half + i);
    if (interleaved) {
        float both[2][PACK];
        read(both[0], from + 2 * i);
        read(both[1], from + 2 * i + PACK);
        #pragma unroll
        for (int j = 0; j < PACK; j++) {
            a[j] = ((float*)both)[2 * j];
            b[j] = ((float*)both)[2 * j + 1];
        }
    } else {
        read(a, from + i);
        read(b, from + half + i);
    }
    float u[2][PACK];
    #pragma unroll
    for (int j = 0; j < PACK; j++) {
        float p = a[j] * c[j] - sign * b[j] * s[j], q = sign * a[j] * s[j] + b[j] * c[j];
        if (interleaved) {
            ((float*)u)[2 * j] = p;
            ((float*)u)[2 * j + 1] = q;
        } else {
            u[0][j] = p;
            u[1][j] = q;
        }
    }
    write(to + (interleaved ? 2 * i : i), u[0]);
    write(to + (interleaved ? 2 * i + PACK : half + i), u[1]);
}

// ---- Cross-entropy of rows of logits against classes; 0xffffffff is no class. loss = lse - x[class], both 0 without a class.

// log(sum(exp(x))) of a row, in thread 0.
__device__ float log_sum_exp(const T* x, i64 n) {
    __shared__ float tops[WARP], totals[WARP];
    float top = NEGATIVE_INFINITY, total = 0.f;
    for (i64 i = threadIdx.x * PACK; i < n; i += blockDim.x * PACK) {
        float v[PACK], most = top;
        read(v, x + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) most = fmaxf(most, v[j]);
        if (most == NEGATIVE_INFINITY) continue;
        total *= __expf(top - most);
        #pragma unroll
        for (int j = 0; j < PACK; j++) total += __expf(v[j] - most);
        top = most;
    }
    #pragma unroll
    for (int k = WARP / 2; k > 0; k /= 2) {
        float t = __shfl_xor_sync(0xffffffffu, top, k), s = __shfl_xor_sync(0xffffffffu, total, k), most = fmaxf(top, t);
        if (most != NEGATIVE_INFINITY) total = total * __expf(top - most) + s * __expf(t - most);
        top = most;
    }
    if (threadIdx.x % WARP == 0) { tops[threadIdx.x / WARP] = top; totals[threadIdx.x / WARP] = total; }
    __syncthreads();
    if (threadIdx.x > 0) return 0.f;
    float most = NEGATIVE_INFINITY, sum = 0.f;
    for (int w = 0; w < blockDim.x / WARP; w++) most = fmaxf(most, tops[w]);
    for (int w = 0; w < blockDim.x / WARP; w++) sum += totals[w] * __expf(tops[w] - most);
    return most + logf(sum);
}

extern "C" __global__ void loss_forward(const T* x, const u32* classes, float* lse, float* loss, i64 n) {
    i64 row = blockIdx.x;
    u32 c = classes[row];
    if (c == 0xffffffffu) {
        if (threadIdx.x == 0) lse[row] = loss[row] = 0.f;
        return;
    }
    float log = log_sum_exp(x + row * n, n);
    if (threadIdx.x > 0) return;
    lse[row] = log;
    loss[row] = log - up(x[row * n + c]);
}

// Both at once: the losses, and logits that become scale (softmax - onehot) in their own memory.
extern "C" __global__ void loss_tile(T* x, const u32* classes, float* loss, i64 n, float scale, int backward) {
    __shared__ float shared_log;
    i64 row = blockIdx.x;
    u32 c = classes[row];
    bool counts = c != 0xffffffffu;
    x += row * n;
    if (counts) {
        float log = log_sum_exp(x, n);
        if (threadIdx.x == 0) {
            loss[row] = log - up(x[c]);
            shared_log = log;
        }
    } else if (threadIdx.x == 0) loss[row] = 0.f;
    __syncthreads();
    if (!backward) return;
    float log = counts ? shared_log : 0.f;
    for (i64 i = threadIdx.x * PACK; i < n; i += blockDim.x * PACK) {
        float v[PACK];
        read(v, x + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) v[j] = counts ? scale * (__expf(v[j] - log) - (i + j == (i64)c ? 1.f : 0.f)) : 0.f;
        write(x + i, v);
    }
}

// dx = scale (exp(x - lse) - [i = class]), 0 without a class.
extern "C" __global__ void loss_backward(const T* x, const u32* classes, const float* lse, T* dx, i64 n, float scale) {
    i64 row = blockIdx.x;
    u32 c = classes[row];
    float log = lse[row];
    x += row * n;
    dx += row * n;
    for (i64 i = threadIdx.x * PACK; i < n; i += blockDim.x * PACK) {
        float v[PACK];
        read(v, x + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++)
            v[j] = c == 0xffffffffu ? 0.f : scale * (__expf(v[j] - log) - (i + j == (i64)c ? 1.f : 0.f));
        write(dx + i, v);
    }
}

// ---- Rows of a table by index: backward. sum[index] += dy, in float.

extern "C" __global__ void embedding_backward(const u32* index, const T* dy, float* sum, i64 n) {
    i64 row = blockIdx.x;
    float* to = sum + index[row] * n;
    for (i64 i = threadIdx.x * PACK; i < n; i += blockDim.x * PACK) {
        float g[PACK];
        read(g, dy + row * n + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) atomicAdd(to + i + j, g[j]);
    }
}

// ---- Sums of squares, one number for each block, in double.

extern "C" __global__ void sum_squares(const T* x, double* out, i64 count) {
    __shared__ double parts[WARP];
    double sum = 0.0;
    for (i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * PACK; i < count; i += gridDim.x * (i64)blockDim.x * PACK) {
        float v[PACK], part = 0.f;
        read(v, x + i);
        #pragma unroll
        for (int j = 0; j < PACK; j++) part += v[j] * v[j];
        sum += part;
    }
    #pragma unroll
    for (int k = WARP / 2; k > 0; k /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, k);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    sum = 0.0;
    for (int w = 0; w < blockDim.x / WARP; w++) sum += parts[w];
    out[blockIdx.x] = sum;
}

// ---- AdamW on float masters, moments and gradients; the parameter of this type gets the rounded master.

extern "C" __global__ void adamw(float* master, float* first, float* second, const float* grad, T* out, i64 count, float scale,
                                 float keep, float blend1, float keep2, float blend2, float step, float root2, float eps) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (i64)blockDim.x) {
        float g = grad[i] * scale, m = first[i], v = second[i];
        m += (g - m) * blend1;
        v = v * keep2 + g * g * blend2;
        float x = master[i] * keep - step * (m / (sqrtf(v) / root2 + eps));
        first[i] = m;
        second[i] = v;
        master[i] = x;
        out[i] = down(x);
    }
}
