/*
 * libblocks: the operations and layers of this project for other programs. This header is all that
 * is installed; docs/library.md has an example.
 *
 * A device is a place where tensors live and work runs, one piece after another in one queue.
 * Backends are
 *   "cpu"        fp32 in the process's own memory;
 *   "cuda"       bf16 in a GPU's memory, with fp32 accumulation and state (if built with CUDA);
 *   "reference"  the same operations as plain loops in fp64, in the process's own memory.
 * A tensor is a pointer into the memory of the device that is given it. It belongs to the caller,
 * who keeps it until the work that uses it has ended. Strides are in elements, sizes in elements
 * unless a name says bytes.
 *
 * Functions that can fail return an enum blocks_status, and leave one line that says why for
 * blocks_message(). A handle is used by one thread at a time; handles are independent of one
 * another. What is opened from a device is freed before it is closed.
 *
 * A struct that begins with `size` has it set by the caller, to its sizeof: later versions may add
 * members at the end.
 */
#ifndef BLOCKS_H
#define BLOCKS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BLOCKS_API __attribute__((visibility("default")))

enum blocks_status {
	BLOCKS_OK,
	BLOCKS_INVALID,     /* an argument is wrong */
	BLOCKS_UNSUPPORTED, /* there is no kernel for these arguments */
	BLOCKS_OOM,         /* there is not enough memory; the message says how much was wanted */
	BLOCKS_DEVICE       /* the device or its driver reported an error */
};

enum blocks_dtype { BLOCKS_F32, BLOCKS_BF16, BLOCKS_I32, BLOCKS_F64 };

enum blocks_pass {
	BLOCKS_TRAIN,      /* forward, then backward */
	BLOCKS_PREFILL,    /* forward over a prompt; with room for more, steps after it */
	BLOCKS_GENERATION, /* steps alone */
	BLOCKS_DESCRIPTION /* nothing: the names and shapes of parameters, without memory */
};

enum blocks_role {
	BLOCKS_INPUT,
	BLOCKS_OUTPUT,
	BLOCKS_STATE,   /* read and written */
	BLOCKS_SCRATCH, /* the library has its own where none is bound */
	BLOCKS_UNREAD   /* of a backward: an output of the forward that it does not read */
};

enum { BLOCKS_DIMS = 4 };

struct blocks_device;
struct blocks_operation;
struct blocks_layer;

/* "0.2.0". */
BLOCKS_API const char *blocks_version(void);
/* What the last failure of this thread said; "" before the first. Valid until the next. */
BLOCKS_API const char *blocks_message(void);
/* The name of backend number i of this build; NULL after the last. */
BLOCKS_API const char *blocks_backend(int i);

/* ---- devices ---- */

/* `which`: NULL for the first, or of CUDA an index, a UUID or a PCI address. */
BLOCKS_API enum blocks_status blocks_device_open(const char *backend, const char *which,
                                                 struct blocks_device **device);
/* NULL is left alone. */
BLOCKS_API void blocks_device_close(struct blocks_device *device);
/* The element of activations and weight matrices; and that of vectors, states and gradients of
 * parameters, which operations call fp32: F64 on "reference". */
BLOCKS_API enum blocks_dtype blocks_device_activation(const struct blocks_device *device);
BLOCKS_API enum blocks_dtype blocks_device_wide(const struct blocks_device *device);
/* Of CUDA: work is submitted to this cudaStream_t from now on, the default stream being NULL. It
 * stays the caller's. The stream before is waited for. Others: BLOCKS_UNSUPPORTED. */
BLOCKS_API enum blocks_status blocks_device_set_stream(struct blocks_device *device, void *stream);
/* Whose kernels are preferred, "portable" or "attention=portable,rat_scan=hopper"; "" for the
 * default. For what is opened from then on. */
BLOCKS_API enum blocks_status blocks_device_set_provider(struct blocks_device *device,
                                                         const char *list);
/* Memory of the device, 256-byte aligned, its contents undefined. */
BLOCKS_API enum blocks_status blocks_allocate(struct blocks_device *device, size_t bytes,
                                              void **memory);
BLOCKS_API void blocks_release(struct blocks_device *device, void *memory);
/* Copies after all work that has been submitted; the host's memory can be used again at once. */
BLOCKS_API enum blocks_status blocks_upload(struct blocks_device *device, void *to,
                                            const void *host, size_t bytes);
BLOCKS_API enum blocks_status blocks_download(struct blocks_device *device, void *host,
                                              const void *from, size_t bytes);
/* Waits for all work, and reports any error that it met. */
BLOCKS_API enum blocks_status blocks_synchronize(struct blocks_device *device);

/* ---- operations ---- */

/* The name of operation number i, "attention", "attention_backward", ...; NULL after the last. */
BLOCKS_API const char *blocks_operation_name(int i);

/*
 * An operation of given sizes, "attention(batch=2,seq_len=64,n_heads=4,d_head=32,mask=causal)".
 *   sizes    batch, seq_len, n_heads, kv_heads, groups, d_head, d_k, d_v, width, d_in, d_out, rank,
 *            chunk, window, vocab: those that the operation has. One that is not named is 1, of
 *            kv_heads n_heads, of window and the family's chunk 0.
 *   options  mask (causal, window, chunk, full, dilated), form, decay (none, constant, scalar,
 *            diagonal), rule (plain, bonus, delta), curve, norm, ...; the first where none is named
 *   others   scale (1/sqrt(d)), eps, rope, rope_width, dilation, initial, kv_len, kv_slots, ...
 * docs/library.md lists them; kernels/kernels.h has the equations. BLOCKS_INVALID names what is not
 * known.
 */
BLOCKS_API enum blocks_status blocks_operation_open(struct blocks_device *device, const char *text,
                                                    struct blocks_operation **operation);
BLOCKS_API void blocks_operation_close(struct blocks_operation *operation);

/* A tensor that an operation takes or gives; the last dimension is contiguous. */
struct blocks_operand {
	size_t size;
	const char *name; /* until the operation is closed */
	enum blocks_role role;
	enum blocks_dtype dtype;
	int64_t shape[BLOCKS_DIMS];  /* outermost first, 1 where it has fewer dimensions */
	int64_t stride[BLOCKS_DIMS]; /* of the bound tensor */
	int optional;                /* may be left unbound */
	int strided;                 /* may have strides of its own; otherwise it is dense */
	void *data;                  /* NULL: not bound */
};

/* Operand number i. Some are there only once others are bound: the gradient of a gate, with the
 * gate. BLOCKS_INVALID after the last. */
BLOCKS_API enum blocks_status blocks_operation_operand(struct blocks_operation *operation, int i,
                                                       struct blocks_operand *operand);
/* The tensor of an operand; `stride` NULL: dense. NULL data takes it back. Nothing is copied. An
 * output may not lie where an input does, except where kernels/kernels.h says so. */
BLOCKS_API enum blocks_status blocks_operation_bind(struct blocks_operation *operation,
                                                    const char *name, void *data,
                                                    const int64_t stride[BLOCKS_DIMS]);
/* Submits the work. BLOCKS_INVALID names an operand that is missing or unknown. Gradients overwrite
 * what was there. */
BLOCKS_API enum blocks_status blocks_operation_run(struct blocks_operation *operation);

/* ---- layers ---- */

/* The name of block number i, "attention", "rat", "gla", ...; NULL after the last. */
BLOCKS_API const char *blocks_layer_name(int i);

struct blocks_layer_options {
	size_t size;
	enum blocks_pass pass;
	int64_t d_model, batch;
	int64_t seq_len;  /* tokens of a forward; 1 of BLOCKS_GENERATION */
	int64_t capacity; /* tokens that the state can hold, the prompt's included; 0: seq_len, and
	                     of BLOCKS_TRAIN there is no state */
	int mixer_only;   /* 1: without the norm before and the residual after */
	double norm_eps;  /* of the norm before; 0: 1e-6 */
	uint64_t seed;    /* of the parameters, which are random until they are set */
};

/*
 * A stack of blocks by its pattern, "rat(chunk=16,groups=2)" or "gla(heads=4),swa(window=64)"
 * (docs/getting-started.md). Its memory is taken here: parameters, gradients, states, what a
 * backward needs of the forward.
 */
BLOCKS_API enum blocks_status blocks_layer_open(struct blocks_device *device, const char *pattern,
                                                const struct blocks_layer_options *options,
                                                struct blocks_layer **layer);
BLOCKS_API void blocks_layer_close(struct blocks_layer *layer);
/* The pattern with all that it left unsaid; until the layer is closed. */
BLOCKS_API const char *blocks_layer_pattern(const struct blocks_layer *layer);

/* A parameter by the name and in the layout of the block's reference implementation
 * ("q_proj.weight"; in a stack of several "layers.0.q_proj.weight"). */
struct blocks_parameter {
	size_t size;
	const char *name; /* until the next call for the same layer */
	int n_dims;
	int64_t shape[BLOCKS_DIMS];
	int same_as; /* the number of the parameter that this is a further name of; else its own */
};

/* Parameter number i; BLOCKS_INVALID after the last. */
BLOCKS_API enum blocks_status blocks_layer_parameter(struct blocks_layer *layer, int i,
                                                     struct blocks_parameter *parameter);
/* Between the layer and `count` dense floats of the host; work that was submitted is waited for.
 * Of blocks_layer_gradient() after a backward. */
BLOCKS_API enum blocks_status blocks_layer_set(struct blocks_layer *layer, const char *name,
                                               const float *values, int64_t count);
BLOCKS_API enum blocks_status blocks_layer_get(struct blocks_layer *layer, const char *name,
                                               float *values, int64_t count);
BLOCKS_API enum blocks_status blocks_layer_gradient(struct blocks_layer *layer, const char *name,
                                                    float *values, int64_t count);

/* y from x, both dense [batch, seq_len, d_model] of activations. y may not be x. */
BLOCKS_API enum blocks_status blocks_layer_forward(struct blocks_layer *layer, const void *x,
                                                   void *y);
/* After a forward of BLOCKS_TRAIN, whose x is still there: dx from dy, shaped alike, and the
 * gradients of all parameters, which overwrite the last ones. */
BLOCKS_API enum blocks_status blocks_layer_backward(struct blocks_layer *layer, const void *dy,
                                                    void *dx);
/* The token at `position` of each sequence: y from x, [batch, d_model]. Positions follow one
 * another, from 0 after blocks_layer_clear() or from seq_len after a forward of BLOCKS_PREFILL. */
BLOCKS_API enum blocks_status blocks_layer_step(struct blocks_layer *layer, int64_t position,
                                                const void *x, void *y);
/* States as they are before the first token. */
BLOCKS_API enum blocks_status blocks_layer_clear(struct blocks_layer *layer);
/* After a forward of BLOCKS_PREFILL, or a forward and backward of BLOCKS_TRAIN: compares what each
 * operation of it wrote with the fp64 reference. *share: the worst, of what is allowed; above 1 is
 * an error. docs/verification.md */
BLOCKS_API enum blocks_status blocks_layer_verify(struct blocks_layer *layer, double *share);

#ifdef __cplusplus
}
#endif

#endif
