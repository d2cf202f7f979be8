/* Parts of a loop, shared out among threads. */

#ifndef TANDEM_SHARING_H
#define TANDEM_SHARING_H

#include "common.h"

typedef void (*Part)(const void *job, size part);

/* run(job, part) for every part below `parts`, in any order and by up to `threads` threads. */
void share(size parts, size threads, Part run, const void *job);

/* Into how many parts a loop of so many products is best cut, at most `most`. */
size parts_of(size products, size most, size threads);

/* Between these two the helpers are awake and look for parts, for this thread alone: what is shared in short succession
   begins at once. BUSY: another thread has them, so this one shares as everybody does; ALONE: their processors have so
   much else to do that one thread is the quicker one. In both cases there is nothing to end. */
enum Sharing { BUSY, ALONE, SHARED };
enum Sharing begin_sharing(size threads);
void end_sharing(void);

/* For how many steps to do without helpers, after one of `elapsed` seconds, which came after `before` steps without. For
   `waited` of them the caller waited for parts that others had taken; its own were this `share` of all. */
size steps_alone(double waited, double elapsed, double share, size before);

/* Parts that helpers took, ever. */
size parts_taken_by_helpers(void);

#endif
