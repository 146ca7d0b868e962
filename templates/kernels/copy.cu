// Copies tensors of four dims, {{ bytes }} bytes at a time; generated from templates/kernels/copy.cu. Sizes and strides are in such
// units, and units along the last dim are neighbours in both tensors.

typedef long long i64;
typedef {{ self.unit() }} Unit;

struct Sizes { i64 b, c, d; };
struct Strides { i64 a, b, c; };

extern "C" __global__ void copy(const Unit* from, Unit* to, Sizes n, Strides f, Strides t, i64 count) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (i64)blockDim.x) {
        i64 d = i % n.d, rest = i / n.d;
        i64 c = rest % n.c, bc = rest / n.c;
        i64 b = bc % n.b, a = bc / n.b;
        to[a * t.a + b * t.b + c * t.c + d] = from[a * f.a + b * f.b + c * f.c + d];
    }
}
