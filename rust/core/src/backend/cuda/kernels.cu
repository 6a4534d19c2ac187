// Kernels of the CUDA backend; compiled by NVRTC at run time, once for each pair of ELEMENT (the
// type that is read) and REAL (the type that is computed in). Tiles of packed units, which only the
// products read, may be of half precision.
//
// Every kernel works on a table: its columns are spread over threads along x, and each block goes
// through a run of consecutive rows, so that lines of memory fetched for one row are still in the
// cache for the next ones even where rows are what is contiguous. Sums are in double precision and
// in a fixed order. No kernel shares memory between threads.

typedef unsigned long long u64;

struct Half { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

typedef ELEMENT S;
typedef REAL T;

__device__ inline double number(double x) { return x; }
__device__ inline float number(float x) { return x; }

__device__ inline float number(BFloat16 x) {
    return __uint_as_float((unsigned)x.bits << 16);
}

__device__ inline float number(Half x) {
    unsigned magnitude = (unsigned)(x.bits & 0x7fffu) << 13;
    unsigned sign = (unsigned)(x.bits & 0x8000u) << 16;
    // Infinity and NaN keep their exponent of all ones; others change their bias by a product,
    // which is exact for subnormal numbers, too.
    float value = magnitude >= 0x0f800000u
        ? __uint_as_float(magnitude | 0x7f800000u)
        : __uint_as_float(magnitude) * 5.192296858534828e+33f;
    return __uint_as_float(__float_as_uint(value) | sign);
}

// Writing, rounded to the nearest number of the target's type.
__device__ inline void put(double& to, double value) { to = value; }
__device__ inline void put(float& to, double value) { to = (float)value; }

__device__ inline void put(BFloat16& to, double value) {
    unsigned bits = __float_as_uint((float)value);
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = (unsigned short)(is_nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ inline void put(Half& to, double value) {
    unsigned bits = __float_as_uint((float)value), magnitude = bits & 0x7fffffffu, half;
    if (magnitude >= 0x477ff000u) {
        // NaN, or what rounds to infinity.
        half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (magnitude < 0x38800000u) {
        // Subnormal numbers lie as far apart as numbers do just above this one.
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    }
    to.bits = (unsigned short)(half | bits >> 16 & 0x8000u);
}

// Only NaN and infinity differ from themselves after this.
__device__ inline bool is_finite(double value) { return value - value == 0.0; }

// Lowers the number of the first example that is not finite; a null pointer stands for nobody who
// wants to know.
__device__ inline void note(u64* noted, u64 example) {
    if (noted) atomicMin(noted, example);
}

#define COLUMN(columns) \
    u64 column = (u64)blockIdx.x * blockDim.x + threadIdx.x; \
    if (column >= columns) return;
#define FOR_ROWS(rows) \
    for (u64 row = rows * blockIdx.y / gridDim.y; row < rows * (blockIdx.y + 1) / gridDim.y; ++row)
#define FOR_BATCH(count) for (u64 item = blockIdx.z; item < count; item += gridDim.z)

// --- units of a mini-batch ----------------------------------------------------------------------

// Units as they are: strides in elements.
struct Dense {
    u64 example, location, feature;
};

// How a kernel slides along one dimension; as in geometry.rs.
struct Slide {
    u64 input, before, kernel, stride, dilation, outputs;
};

// Patches of [N, C, depth, height, width]: strides of x in elements, and the three slides.
struct Patches {
    u64 example, channel, depth, height, width;
    Slide deep, high, wide;
};

// Reads one feature, unit after unit: `seek` goes to a unit, `next` to the one after it. Neither
// `next` nor `at` divides.
struct DenseReader {
    const S* x;
    const Dense& source;
    u64 locations, n, t;
    __device__ DenseReader(const S* x, const Dense& source, u64 locations, u64 feature)
        : x(x + feature * source.feature), source(source), locations(locations) {}
    __device__ void seek(u64 unit) {
        n = unit / locations;
        t = unit % locations;
    }
    __device__ void next() {
        if (++t == locations) {
            t = 0;
            ++n;
        }
    }
    __device__ bool inside() const { return true; }
    __device__ S at(S) const { return x[n * source.example + t * source.location]; }
};

// Where a kernel position is along one dimension, output after output.
struct Along {
    unsigned output, outputs, place, start, stride, input;
    __device__ Along(const Slide& slide, unsigned position)
        : outputs(slide.outputs), start(position * (unsigned)slide.dilation
                                        - (unsigned)slide.before),
          stride(slide.stride), input(slide.input) {}
    __device__ void seek(unsigned to) {
        output = to;
        place = start + to * stride;
    }
    // Whether the last output was left behind, and the first one is next again.
    __device__ bool next() {
        place += stride;
        if (++output < outputs) return false;
        seek(0);
        return true;
    }
    // Places in the padding before the input have wrapped around to the largest numbers.
    __device__ bool inside() const { return place < input; }
};

struct PatchReader {
    const S* x;
    const Patches& source;
    Along deep, high, wide;
    u64 locations, n;
    __device__ PatchReader(const S* x, const Patches& source, u64 locations, u64 feature)
        : PatchReader(x, source, locations, (unsigned)feature, (unsigned)source.wide.kernel,
                      (unsigned)source.high.kernel, (unsigned)source.deep.kernel) {}
    __device__ PatchReader(const S* x, const Patches& source, u64 locations, unsigned feature,
                           unsigned across, unsigned down, unsigned back)
        : x(x + (u64)(feature / (across * down * back)) * source.channel), source(source),
          deep(source.deep, feature / (across * down) % back),
          high(source.high, feature / across % down), wide(source.wide, feature % across),
          locations(locations) {}
    __device__ void seek(u64 unit) {
        n = unit / locations;
        unsigned t = unit % locations;
        wide.seek(t % wide.outputs);
        high.seek(t / wide.outputs % high.outputs);
        deep.seek(t / wide.outputs / high.outputs);
    }
    __device__ void next() {
        if (wide.next() && high.next() && deep.next()) ++n;
    }
    __device__ bool inside() const { return wide.inside() && high.inside() && deep.inside(); }
    __device__ S at(S zero) const {
        if (!inside()) return zero;
        return x[n * source.example + deep.place * source.depth + high.place * source.height
                 + wide.place * source.width];
    }
};

// Row `row` of `out` is the sum of this share of all units, feature by feature.
template <class Reader, class Source>
__device__ inline void sum_units(
    const S* x, const Source& source, u64 locations, u64* noted, u64 first_example, u64 units,
    u64 runs, u64 features, double* out)
{
    COLUMN(features)
    Reader reader(x, source, locations, column);
    S zero = {};
    FOR_ROWS(runs) {
        u64 unit = units * row / runs, end = units * (row + 1) / runs;
        double sum = 0.0;
        for (reader.seek(unit); unit < end; ++unit, reader.next()) {
            double value = number(reader.at(zero));
            if (!is_finite(value)) note(noted, first_example + reader.n);
            sum += value;
        }
        out[row * features + column] = sum;
    }
}

extern "C" __global__ void sum_dense(
    const S* x, Dense source, u64 locations, u64* noted, u64 first_example, u64 units, u64 runs,
    u64 features, double* out)
{
    sum_units<DenseReader>(x, source, locations, noted, first_example, units, runs, features, out);
}

extern "C" __global__ void sum_patches(
    const S* x, Patches source, u64 locations, u64* noted, u64 first_example, u64 units, u64 runs,
    u64 features, double* out)
{
    sum_units<PatchReader>(x, source, locations, noted, first_example, units, runs, features, out);
}

// What is subtracted from units, `factor` times what lies at `address`, which is 0 where nothing is:
// of all units (example 0) or of each example. `group` features that follow one another have the same,
// and the next ones another, so many numbers further. With `gaps` what is beyond the input stays zero.
// As in source.rs.
struct Centre {
    u64 address, example, group, step, factor, gaps;
};

__device__ inline double number_of(u64 bits) {
    union { u64 bits; double value; } number = { bits };
    return number.value;
}

__device__ inline const double* of_feature(const Centre& centre, u64 feature) {
    return (const double*)centre.address + feature / centre.group * centre.step;
}

// Rows of `out` are consecutive units minus their centre. Each group of `size` features is followed
// by `appended` columns (0 or 1) of a constant.
template <class Reader, class Source, class Tile>
__device__ inline void pack_units(
    const S* x, const Source& source, u64 locations, u64* noted, u64 first_example, u64 first,
    u64 rows, u64 size, u64 appended, double constant, const Centre& centre, u64 columns, Tile* out)
{
    COLUMN(columns)
    u64 width = size + appended;
    u64 feature = column / width * size + column % width;
    bool is_constant = column % width == size;
    Reader reader(x, source, locations, is_constant ? 0 : feature);
    S zero = {};
    const double* means = of_feature(centre, feature);
    double factor = number_of(centre.factor);
    u64 row = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
    for (reader.seek(first + row); row < end; ++row, reader.next()) {
        double value = constant;
        if (!is_constant) {
            value = number(reader.at(zero));
            if (!is_finite(value)) note(noted, first_example + reader.n);
            if (centre.address && !(centre.gaps && !reader.inside())) {
                value -= means[reader.n * centre.example] * factor;
            }
        }
        put(out[row * columns + column], value);
    }
}

extern "C" __global__ void pack_dense(
    const S* x, Dense source, u64 locations, u64* noted, u64 first_example, u64 first, u64 rows,
    u64 size, u64 appended, double constant, Centre centre, u64 columns, T* out)
{
    pack_units<DenseReader>(x, source, locations, noted, first_example, first, rows, size,
                               appended, constant, centre, columns, out);
}

extern "C" __global__ void pack_dense_half(
    const S* x, Dense source, u64 locations, u64* noted, u64 first_example, u64 first, u64 rows,
    u64 size, u64 appended, double constant, Centre centre, u64 columns, Half* out)
{
    pack_units<DenseReader>(x, source, locations, noted, first_example, first, rows, size,
                               appended, constant, centre, columns, out);
}

extern "C" __global__ void pack_dense_bfloat16(
    const S* x, Dense source, u64 locations, u64* noted, u64 first_example, u64 first, u64 rows,
    u64 size, u64 appended, double constant, Centre centre, u64 columns, BFloat16* out)
{
    pack_units<DenseReader>(x, source, locations, noted, first_example, first, rows, size,
                               appended, constant, centre, columns, out);
}

extern "C" __global__ void pack_patches(
    const S* x, Patches source, u64 locations, u64* noted, u64 first_example, u64 first, u64 rows,
    u64 size, u64 appended, double constant, Centre centre, u64 columns, T* out)
{
    pack_units<PatchReader>(x, source, locations, noted, first_example, first, rows, size,
                               appended, constant, centre, columns, out);
}

extern "C" __global__ void pack_patches_half(
    const S* x, Patches source, u64 locations, u64* noted, u64 first_example, u64 first, u64 rows,
    u64 size, u64 appended, double constant, Centre centre, u64 columns, Half* out)
{
    pack_units<PatchReader>(x, source, locations, noted, first_example, first, rows, size,
                               appended, constant, centre, columns, out);
}

extern "C" __global__ void pack_patches_bfloat16(
    const S* x, Patches source, u64 locations, u64* noted, u64 first_example, u64 first, u64 rows,
    u64 size, u64 appended, double constant, Centre centre, u64 columns, BFloat16* out)
{
    pack_units<PatchReader>(x, source, locations, noted, first_example, first, rows, size,
                               appended, constant, centre, columns, out);
}

// --- patches by offsets -------------------------------------------------------------------------

// A box of places in an image, rows from each place to the one it is multiplied with, and how many
// places the strips before it have; as in offsets.rs.
struct Strip {
    u64 z, depth, y, height, x, width, shift, first;
};

struct Strips {
    Strip of[32];
};

// The rows of some of all strips' places in every image, and behind all of these the rows that the
// shifts lead to. A row is so many pieces of four bytes, an image so many rows.
extern "C" __global__ void gather_strips(
    const unsigned* images, Strips strips, u64 count, u64 number, u64 image, u64 high, u64 wide,
    u64 places, u64 most, u64 pieces, unsigned* out)
{
    COLUMN(pieces)
    FOR_BATCH(count) {
        const Strip& strip = strips.of[item];
        u64 size = strip.depth * strip.height * strip.width, own = number * size;
        FOR_ROWS(most) {
            if (row >= 2 * own) break;
            u64 shifted = row >= own, place = shifted ? row - own : row;
            u64 target = (shifted * places + strip.first) * number + place;
            u64 rest = place % size, x = strip.x + rest % strip.width;
            u64 y = strip.y + rest / strip.width % strip.height;
            u64 z = strip.z + rest / strip.width / strip.height;
            u64 source = place / size * image + (z * high + y) * wide + x + shifted * strip.shift;
            out[target * pieces + column] = images[source * pieces + column];
        }
    }
}

// Four numbers of sixteen bits in each word; as in offsets.rs.
struct Pairs {
    u64 words[256];
    __device__ u64 at(u64 place) const { return words[place / 4] >> 16 * (place % 4) & 0xffffu; }
};

// Where the input is along one dimension for the outputs of a kernel position: from `first` on,
// before `last`.
struct Span {
    u64 offset, first, last;
    __device__ Span(const Slide& slide, u64 position) : offset(position * slide.dilation) {
        first = slide.before > offset ? slide.before - offset : 0;
        u64 end = slide.input + slide.before > offset ? slide.input + slide.before - offset : 0;
        last = end < slide.outputs ? end : slide.outputs;
        if (first > last) first = last;
    }
    __device__ bool has(u64 output) const { return output >= first && output < last; }
};

// For each kernel position (item), example (row) and feature: the sum, over the patches in which the
// position is beyond the input, of the feature less its centre, or of minus half of that where the
// feature is beyond the input, too. [positions, examples, features]; of patches under stride 1.
extern "C" __global__ void sum_border(
    const S* x, Patches source, Centre centre, u64 positions, u64 examples, u64 features, T* out)
{
    COLUMN(features)
    u64 across = source.wide.kernel, down = source.high.kernel;
    u64 channel = column / positions, own = column % positions;
    Span own_deep(source.deep, own / (across * down)), own_high(source.high, own / across % down),
        own_wide(source.wide, own % across);
    const double* means = of_feature(centre, channel);
    double factor = number_of(centre.factor);
    FOR_BATCH(positions) {
        Span deep(source.deep, item / (across * down)), high(source.high, item / across % down),
            wide(source.wide, item % across);
        FOR_ROWS(examples) {
            const S* image = x + row * source.example + channel * source.channel;
            double centred = means[row * centre.example] * factor, sum = 0.0;
            for (u64 z = 0; z < source.deep.outputs; ++z) {
                for (u64 y = 0; y < source.high.outputs; ++y) {
                    bool is_border = !deep.has(z) || !high.has(y);
                    bool is_seen = own_deep.has(z) && own_high.has(y);
                    u64 line = (z + own_deep.offset - source.deep.before) * source.depth
                        + (y + own_high.offset - source.high.before) * source.height;
                    for (u64 t = 0; t < source.wide.outputs; ++t) {
                        if (!is_border && wide.has(t)) {
                            t = wide.last - 1;
                            continue;
                        }
                        u64 place = (t + own_wide.offset - source.wide.before) * source.width;
                        sum += is_seen && own_wide.has(t)
                            ? (double)number(image[line + place]) - centred : -0.5 * centred;
                    }
                }
            }
            out[(item * examples + row) * features + column] = (T)sum;
        }
    }
}

// Adds to the lower triangle what products of channels with channels say of pairs of features. For
// each pair of kernel positions there is where its products begin in what follows, and the products'
// numbers, with the highest bit where one is subtracted. From that what is known of the border, and its
// transpose, are subtracted, where it is not a null pointer. Behind the features come their sums, if
// there are any, and the number of units.
extern "C" __global__ void add_offsets(
    const T* blocks, Pairs pairs, u64 count, u64 positions, u64 channels, double weight,
    const T* border, const double* sums, double units, u64 size, T* out, u64 down, u64 across)
{
    COLUMN(size)
    u64 features = channels * positions, area = channels * channels;
    u64 channel = column / positions, position = column % positions;
    FOR_ROWS(size) {
        if (row < column) continue;
        double value = 0.0;
        if (row == features) {
            value = column == features ? units : sums[column];
        } else {
            u64 above = row / positions, other = row % positions;
            bool in_order = other <= position;
            u64 first = in_order ? other : position, second = in_order ? position : other;
            u64 pair = first * positions - first * (first + 1) / 2 + second;
            u64 place = in_order ? above * channels + channel : channel * channels + above;
            for (u64 i = pairs.at(pair); i < pairs.at(pair + 1); ++i) {
                u64 number = pairs.at(count + 1 + i);
                double term = blocks[(number & 0x7fffu) * area + place];
                value += number & 0x8000u ? -term : term;
            }
            if (border) {
                value -= (double)border[row * features + column] + border[column * features + row];
            }
        }
        out[row * down + column * across] += (T)(weight * value);
    }
}

// --- sums ---------------------------------------------------------------------------------------

// out[j] = in[j] + in[j + columns] + ...
extern "C" __global__ void fold(const double* in, u64 length, u64 columns, double* out)
{
    COLUMN(columns)
    double sum = 0.0;
    for (u64 i = column; i < length; i += columns) sum += in[i];
    out[column] = sum;
}

// partial[run, column] = sum over a run of rows of a * b.
extern "C" __global__ void dot(
    const T* a, u64 a_row, u64 a_column, const T* b, u64 b_row, u64 b_column, u64 rows,
    u64 columns, double* partial)
{
    COLUMN(columns)
    double sum = 0.0;
    FOR_ROWS(rows) {
        sum += (double)a[row * a_row + column * a_column] * b[row * b_row + column * b_column];
    }
    partial[blockIdx.y * columns + column] = sum;
}

// --- products made ready ------------------------------------------------------------------------

// What is to be made of a layer's product `out` with `v`: its first thread among those of all layers
// and how many it has, the bits of two numbers, and where everything lies. As in elements.rs.
struct Product {
    u64 first, threads, elements, columns, scale, damping;
    u64 v, v_row, v_column, out, down, across, inner;
};

struct Products {
    Product layer[32];
};

// Threads that add up the partial sums of a layer. As in elements.rs.
#define ADDING 128

// The layer of a thread, among so many.
template <typename Layers>
__device__ inline u64 layer_of(const Layers& layers, u64 count, u64 thread) {
    u64 layer = 0;
    while (layer + 1 < count && layers.layer[layer + 1].first <= thread) ++layer;
    return layer;
}

// out = scale * out + damping * v; a pair of partial sums for every thread: of v * out as it was, and
// of v * v.
extern "C" __global__ void combine(Products products, u64 count, u64 threads, double* partial)
{
    COLUMN(threads)
    const Product& product = products.layer[layer_of(products, count, column)];
    double curved = 0.0, flat = 0.0;
    T by = (T)number_of(product.scale), with = (T)number_of(product.damping);
    const T* v = (const T*)product.v;
    T* out = (T*)product.out;
    for (u64 e = column - product.first; e < product.elements; e += product.threads) {
        u64 row = e / product.columns, across = e % product.columns;
        T own = v[row * product.v_row + across * product.v_column];
        T* target = out + row * product.down + across * product.across;
        curved += (double)own * *target;
        flat += (double)own * own;
        *target = by * *target + with * own;
    }
    partial[2 * column] = curved;
    partial[2 * column + 1] = flat;
}

// Pairs of sums over the threads of a layer, ADDING of them.
extern "C" __global__ void add_partial(
    Products products, u64 count, const double* partial, double* sums)
{
    COLUMN(2 * ADDING * count)
    const Product& product = products.layer[column / (2 * ADDING)];
    double sum = 0.0;
    for (u64 thread = column / 2 % ADDING; thread < product.threads; thread += ADDING) {
        sum += partial[2 * (product.first + thread) + column % 2];
    }
    sums[column] = sum;
}

// The two inner products of each layer.
extern "C" __global__ void write_inner(Products products, u64 count, const double* sums)
{
    COLUMN(2 * count)
    const Product& product = products.layer[column / 2];
    const double* own = sums + column / 2 * (2 * ADDING) + column % 2;
    double sum = 0.0;
    for (u64 i = 0; i < ADDING; ++i) sum += own[2 * i];
    ((double*)product.inner)[column % 2] = sum;
}

// --- merged weights -----------------------------------------------------------------------------

// A layer and the BatchNorm after it: the number of its first row among those of all layers, columns
// of its weight, the bits of epsilon, then addresses, 0 for what is not there. Its weight, the
// anchor and their gradients lie row by row. As in merging.rs.
struct Merged {
    u64 first, inputs, epsilon, weight, bias, gamma, mean, variance;
    u64 others[7];
};

struct MergedLayers {
    Merged layer[32];
};

// Threads that share a row. As in merging.rs.
#define LANES 32

// The other addresses: forward, and backward.
enum Forward { BETA, ANCHOR, OUT };
enum Backward { GRADIENT, TO_WEIGHT, TO_BIAS, TO_GAMMA, TO_BETA, TO_MEAN, TO_VARIANCE };

__device__ inline double at(u64 address, u64 index, double otherwise) {
    return address ? (double)((const T*)address)[index] : otherwise;
}

__device__ inline double inverse_deviation(const Merged& layer, u64 own) {
    return 1.0 / sqrt(at(layer.variance, own, 0.0) + number_of(layer.epsilon));
}

__device__ inline double centred(const Merged& layer, u64 own) {
    return at(layer.bias, own, 0.0) - at(layer.mean, own, 0.0);
}

// LANES threads to a row, of each layer's [D, K + 1].
extern "C" __global__ void merge(MergedLayers layers, u64 count, u64 rows)
{
    COLUMN(rows * LANES)
    const Merged& layer = layers.layer[layer_of(layers, count, column / LANES)];
    u64 own = column / LANES - layer.first, inputs = layer.inputs;
    const T* weight = (const T*)layer.weight + own * inputs;
    const T* anchor = (const T*)layer.others[ANCHOR] + own * (inputs + 1);
    T* out = (T*)layer.others[OUT] + own * (inputs + 1);
    double gain = at(layer.gamma, own, 1.0) * inverse_deviation(layer, own);
    for (u64 k = column % LANES; k < inputs; k += LANES) out[k] = (T)gain * weight[k] - anchor[k];
    if (column % LANES == 0) {
        double shift = at(layer.others[BETA], own, 0.0) + gain * centred(layer, own);
        out[inputs] = (T)shift - anchor[inputs];
    }
}

// The weight's gradient, and for each thread of a row a part of the inner product of what goes
// back with the weight.
extern "C" __global__ void merge_backward(
    MergedLayers layers, u64 count, u64 rows, double* partial)
{
    COLUMN(rows * LANES)
    const Merged& layer = layers.layer[layer_of(layers, count, column / LANES)];
    u64 own = column / LANES - layer.first, inputs = layer.inputs;
    const T* weight = (const T*)layer.weight + own * inputs;
    const T* gradient = (const T*)layer.others[GRADIENT] + own * (inputs + 1);
    T* to_weight = layer.others[TO_WEIGHT] ? (T*)layer.others[TO_WEIGHT] + own * inputs : 0;
    T gain = (T)(at(layer.gamma, own, 1.0) * inverse_deviation(layer, own));
    double sum = 0.0;
    for (u64 k = column % LANES; k < inputs; k += LANES) {
        if (to_weight) to_weight[k] = gain * gradient[k];
        sum += (double)gradient[k] * weight[k];
    }
    partial[column] = sum;
}

// The gradients of bias, gamma, beta, mean and variance.
extern "C" __global__ void merge_backward_rows(
    MergedLayers layers, u64 count, u64 rows, double* partial)
{
    COLUMN(rows)
    const Merged& layer = layers.layer[layer_of(layers, count, column)];
    u64 own = column - layer.first;
    double of_shift = at(layer.others[GRADIENT], own * (layer.inputs + 1) + layer.inputs, 0.0);
    double inverse = inverse_deviation(layer, own), gain = at(layer.gamma, own, 1.0) * inverse;
    double of_gain = of_shift * centred(layer, own);
    for (u64 lane = 0; lane < LANES; ++lane) of_gain += partial[column * LANES + lane];
    double values[5] = {gain * of_shift, inverse * of_gain, of_shift, -gain * of_shift,
                        -0.5 * gain * inverse * inverse * of_gain};
    for (int i = 0; i < 5; ++i) {
        u64 to = layer.others[TO_BIAS + i];
        if (to) ((T*)to)[own] = (T)values[i];
    }
}

// What the gradients of moments become in their input, added to what is there if that is kept.
extern "C" __global__ void moments_backward(
    const S* x, Dense from, u64 examples, u64 channels, u64 places, const T* mean,
    const T* of_mean, const T* of_variance, u64 keep, S* out, Dense to)
{
    COLUMN(channels * places)
    // Neighbouring threads take neighbouring elements.
    bool by_channel = to.feature == 1;
    u64 channel = by_channel ? column % channels : column / places;
    u64 place = by_channel ? column / channels : column % places;
    double reciprocal = 1.0 / ((double)examples * places);
    T centre = mean[channel];
    T slope = of_variance ? (T)(2.0 * reciprocal * of_variance[channel]) : (T)0;
    T constant = of_mean ? (T)(reciprocal * of_mean[channel]) : (T)0;
    x += place * from.location + channel * from.feature;
    out += place * to.location + channel * to.feature;
    FOR_ROWS(examples) {
        T value = ((T)number(x[row * from.example]) - centre) * slope + constant;
        S& target = out[row * to.example];
        put(target, keep ? (T)number(target) + value : value);
    }
}

// --- elementwise --------------------------------------------------------------------------------

// Copies a stack of matrices, converting; ELEMENT is float or double here.
extern "C" __global__ void convert(
    const S* from, u64 from_item, u64 from_row, u64 from_column, u64 count, u64 rows, u64 columns,
    T* to, u64 to_item, u64 to_row, u64 to_column)
{
    COLUMN(columns)
    FOR_BATCH(count) {
        FOR_ROWS(rows) {
            to[item * to_item + row * to_row + column * to_column] =
                (T)number(from[item * from_item + row * from_row + column * from_column]);
        }
    }
}

extern "C" __global__ void add_scaled(
    double alpha, const T* x, u64 x_row, u64 x_column, u64 rows, u64 columns, T* y, u64 y_row,
    u64 y_column)
{
    COLUMN(columns)
    T factor = (T)alpha;
    FOR_ROWS(rows) {
        y[row * y_row + column * y_column] += factor * x[row * x_row + column * x_column];
    }
}

// Divides the lower triangle of each matrix of a stack and copies it to the upper one.
extern "C" __global__ void symmetrize(
    T* x, u64 count, u64 step, u64 size, u64 down, u64 across, double divisor)
{
    COLUMN(size)
    FOR_BATCH(count) {
        T* matrix = x + item * step;
        FOR_ROWS(size) {
            if (row >= column) {
                T value = matrix[row * down + column * across] / (T)divisor;
                matrix[row * down + column * across] = value;
                matrix[column * down + row * across] = value;
            }
        }
    }
}

// Zeroes what is above the diagonal.
extern "C" __global__ void zero_upper(T* x, u64 size, u64 down, u64 across)
{
    COLUMN(size)
    FOR_ROWS(size) {
        if (row < column) x[row * down + column * across] = (T)0;
    }
}

// The entry of a spectrum: see backend.rs.
__device__ inline double entry(
    const double* left, const double* right, u64 pairs, u64 rows, u64 columns, double constant,
    u64 row, u64 column)
{
    double sum = constant;
    for (u64 k = 0; k < pairs; ++k) sum += left[k * rows + row] * right[k * columns + column];
    return sum;
}

extern "C" __global__ void write_spectrum(
    const double* left, const double* right, u64 pairs, double constant, u64 rows, u64 columns,
    T* x, u64 down, u64 across)
{
    COLUMN(columns)
    FOR_ROWS(rows) {
        x[row * down + column * across] =
            (T)entry(left, right, pairs, rows, columns, constant, row, column);
    }
}

extern "C" __global__ void scale_by_spectrum(
    const double* left, const double* right, u64 pairs, double constant, double power, u64 rows,
    u64 columns, T* x, u64 down, u64 across)
{
    COLUMN(columns)
    FOR_ROWS(rows) {
        double value = entry(left, right, pairs, rows, columns, constant, row, column);
        value = power == -1.0 ? 1.0 / value : pow(value, power);
        x[row * down + column * across] *= (T)value;
    }
}

// Adds G (x) A to `out`, [D K, D K].
extern "C" __global__ void add_kronecker(
    const T* a, u64 a_row, u64 a_column, u64 inputs, const T* g, u64 g_row, u64 g_column,
    u64 size, T* out, u64 down, u64 across)
{
    COLUMN(size)
    u64 e = column / inputs, l = column % inputs;
    FOR_ROWS(size) {
        u64 d = row / inputs, k = row % inputs;
        double product =
            (double)g[d * g_row + e * g_column] * (double)a[k * a_row + l * a_column];
        T* target = out + row * down + column * across;
        *target = (T)(*target + product);
    }
}

// --- checks -------------------------------------------------------------------------------------

// The extents and strides of five dimensions.
struct Extents {
    u64 extent[5], stride[5];
};

// Lowers `first` to the smallest row-major number of an element that is NaN or infinite.
extern "C" __global__ void first_non_finite(
    const S* x, Extents extents, u64 rows, u64 columns, u64* first)
{
    COLUMN(columns)
    FOR_ROWS(rows) {
        u64 rest = row * columns + column, place = 0;
        for (int d = 4; d >= 0; --d) {
            if (extents.extent[d] == 1) continue;
            place += rest % extents.extent[d] * extents.stride[d];
            rest /= extents.extent[d];
        }
        if (!is_finite(number(x[place]))) atomicMin(first, row * columns + column);
    }
}
