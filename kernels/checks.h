#pragma once

#include "kernels/route.h"
#include "kernels/types.h"

/// Argument checks shared by the operations. `who` names the operation and argument at the start of the message.
namespace moraine::kernels {

/// Shapes, offsets and pointers of a set of experts. Throws InternalError.
void check_experts(const RaggedExperts& experts, const Exec& exec, const char* who);
/// A [tokens, width] matrix: present unless it has no elements, rows not overlapping, aligned. Throws InternalError.
void check_rows(const void* data, int64_t ld, int64_t tokens, int64_t width, DType dtype, const Exec& exec,
                const char* who);
/// Route built for these experts; gates present and finite (NumericError), the latter only if exec.check_inputs.
void check_route(const Route* route, const RaggedExperts& experts, const char* who);
void check_gates(const void* gates, const Route& route, DType dtype, const Exec& exec, const char* who);

int64_t max_rank(const RaggedExperts& experts);
int64_t total_rank(const RaggedExperts& experts);
/// Row offsets where the kernels of the device can read them.
const int64_t* device_row_offsets(const RaggedExperts& experts, const Exec& exec);

}  // namespace moraine::kernels
