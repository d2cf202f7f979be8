/* Makes the loops of BODY, a file's own name, twice: for float and for bfloat16 numbers. See common.h. */

#define FLOAT(name) name##_float32
#define real float
#define LOAD(value) (value)
#define STORE(value) (value)
#include BODY
#undef FLOAT
#undef real
#undef LOAD
#undef STORE

#define FLOAT(name) name##_bfloat16
#define real bfloat16
#define LOAD(value) widened(value)
#define STORE(value) narrowed(value)
#include BODY
