/* C ABI of the native CPU kernels. Needs no torch and no Python; bound with ctypes in library.py.

   A weight W [N, K] holds unsigned codes q, w = (q - z) s, or w = value[q] s, in units of 16 rows x C columns
   (layout.cpp). */
#ifndef QUANTKIT_CPU_H
#define QUANTKIT_CPU_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qk_weight {
    const uint8_t *units;
    const float *bias;   /* [n] or null */
    float scale_factor;  /* every stored scale is multiplied by it */
    int32_t n, k, group; /* group = k: one scale per output channel */
    int32_t bits;        /* 2, 3, 4, 8 */
    int32_t scale_type;  /* 0 fp16, 1 fp32, 2 fp8 e4m3 (of fp4 in groups of 16 and 32) */
    int32_t table;       /* 0 integers, 1 nf4, 2 fp8 e4m3, 3 fp4 e2m1: the code indexes a table */
    float input_scale;   /* of compute 4 and 5: the stored scale of x; 0: every token has its own */
    int32_t input_zero;  /* and its zero point, -128..127 */
} qk_weight;

/* x_type, y_type: 0 fp32, 1 bf16, 2 fp16. compute: 0 float, 1 int8 per token and group, 2 int8 per
   token, 3 float, 15 bits of fp32, 4 int8 as compressed-tensors has it: q = rne(x / s + input_zero) within -128..127,
   s = input_scale or max|x| / 127.5 of the token, and y = s sum of q w: the caller's bias holds what input_zero adds.
   5 x becomes e4m3(x / s) s in its own type, s = input_scale or max|x| / 448 of the token; 6 the same with
   max|x| / 448 of the token and 128 columns. Only integers take 1, 2 and 4. */

/* y [m, n] = x [m, k] W^T + bias, rows contiguous. 0, or 1: this weight or compute is not supported. */
int qk_linear(const qk_weight *w, const void *x, int x_type, int64_t m, int compute, void *y, int y_type, int threads);

/* The experts of a mixture: `each` weights per expert that read the same x, expert by expert, all of one k and, at the
   same place, one n. Slots offsets[e] .. offsets[e + 1] - 1 are those of expert e; slot s reads row rows[s] of x. */
typedef struct qk_grouped {
    const qk_weight *weights; /* [count][each] */
    const int64_t *offsets;   /* [count + 1], ascending from 0 to slots */
    const int64_t *rows;      /* [slots], of 0 .. m - 1 */
    int64_t slots;
    int32_t count, each;
} qk_grouped;

/* y [slots, sum of n] from x [m, k]: the outputs of an expert's weights side by side. Experts without slots are not
   read. Types, compute and result as for qk_linear; 2: out of memory; 3: offsets or rows out of range. */
int qk_grouped_linear(const qk_grouped *g, const void *x, int x_type, int64_t m, int compute, void *y, int y_type,
                      int threads);

/* Bytes of the units of a weight; 0 if its bits, group or sizes are not supported. */
size_t qk_weight_bytes(const qk_weight *w);

/* Tensors as on disk, packed int32 [n, ceil(k bits / 32)], scale [n, k/group] (already fp32 and divided by
   scale_factor), zero_packed int32 [ceil(n bits / 32), k/group] or null (z = 2^(bits-1)), to w->units and back. */
void qk_pack(const qk_weight *w, uint8_t *units, const int32_t *packed, const float *scale, const int32_t *zero_packed);
void qk_unpack(const qk_weight *w, int32_t *packed, float *scale, int32_t *zero_packed);

/* Instruction set paths: 0 portable, 1 avx2, 2 avx512, 3 amx. */
int qk_isa(void);                   /* the one in use; -1: QUANTKIT_ISA names one this machine lacks, or none */
int qk_isa_available(int isa);
int qk_set_isa(int isa);            /* 0, or -1 and no change if this machine lacks it */
const char *qk_isa_name(int isa);
const char *qk_cpu_flags(void);     /* vendor, family and the instruction sets found, for people */
const char *qk_sources(void);       /* digest of the sources it was built from; empty if its builder gave none */

/* Groups of weights and, for each of them, several grids that could round it: level = round(w / s) within
   [-z, qmax - z], off = level - w / s. */
typedef struct qk_range {
    const float *w;      /* [groups, group] */
    const float *scale;  /* [candidates, groups] */
    const float *zero;   /* [candidates, groups] */
    const float *column; /* [column_groups, group], of group g the row g mod column_groups; or null */
    float *error;        /* [candidates, groups] */
    int64_t groups, group, candidates, column_groups;
    float qmax;
} qk_range;

/* error = sum |off|^2.5 s^2.5, or with columns sum column off^2 s^2, about. Where the cut of a group's largest weight
   alone costs more than an earlier candidate does, error is that cost: less than the sum, more than the least. */
void qk_range_errors(const qk_range *r, int threads);

/* A block of columns of several weights of one shape, transposed: [columns, rows] of each. Rows of all tensors are
   contiguous. matrix: row j holds what column j takes from each column before it, and its own pivot. */
enum { QK_MOST_COLUMNS = 128 };

typedef struct qk_columns {
    const float *value;      /* [weights, columns, rows] */
    const float *gradient;   /* of qk_descend: the same */
    const float *matrix;     /* [weights, columns, columns] */
    const float *scale;      /* [weights, groups, rows] */
    const float *low, *high; /* the lowest and the highest level, as scale */
    const int32_t *group_of; /* [weights, columns] */
    float *first_out;        /* as value: levels, or new values */
    float *second_out;       /* as value: errors of qk_spread */
    int64_t weights, columns, rows, groups;
    int64_t each, row;                   /* floats from a weight to the next, from a column to the next; of outputs too */
    int64_t gradient_each, gradient_row; /* of gradient */
} qk_columns;

/* level = round(w / s), error = (w - level s) / matrix[j][j], w less matrix[j][i] error_i of all columns i before. */
void qk_spread(const qk_columns *c, int threads);

/* new = round((old + gradient / matrix[j][j]) / s) s, gradient less matrix[j][i] (new_i - old_i) of all before. */
void qk_descend(const qk_columns *c, int threads);

/* A weight [n, k] and its grid, scale [n, k / group]: code = that of the level nearest to w / s. */
enum { QK_ENCODE_INTEGERS = 0, QK_ENCODE_FP8 = 1, QK_ENCODE_TABLE = 2 };

typedef struct qk_encoding {
    const float *w;         /* [n, k] */
    const float *scale;     /* [n, k / group] */
    const float *zero;      /* of integers: [n, k / group]; codes are level + zero, 0 to qmax */
    const float *edges;     /* of a table: [levels - 1], rising, the largest w / s that goes to each level but the last */
    const uint8_t *code_of; /* of a table: [levels] */
    uint8_t *codes;         /* [n, k] */
    int64_t n, k, group;
    int32_t kind, levels;
    float qmax;
} qk_encoding;

void qk_encode(const qk_encoding *e, int threads);

/* And back: w = values[code] scale; and how far that is from what the codes were made of. */
typedef struct qk_decoding {
    const uint8_t *codes; /* [n, k] */
    const float *scale;   /* [n, k / group] */
    const float *values;  /* [256] */
    const float *original; /* [n, k]; or null */
    float *w;             /* [n, k] */
    float *error, *norm;  /* with original: [n], the sums of (w - original)^2 and original^2 of a row */
    int64_t n, k, group;
} qk_decoding;

void qk_decode(const qk_decoding *d, int threads);

/* 2 MiB aligned memory in huge pages where the system gives them; null if there is none. */
void *qk_arena_new(size_t bytes);
void qk_arena_free(void *arena);

#ifdef __cplusplus
}
#endif
#endif
