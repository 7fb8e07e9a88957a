#pragma once

#include "kernels/types.h"

namespace moraine::kernels {

/// One adapter whose single ranks are switched or weighted per token (SMoRA, FlyLoRA).
///
///   u_t = A x_t;   y_t = y0_t + s Bt^T (u_t * m_t)
///   v_t = Bt dy_t;   dm_t = s u_t * v_t;   dx_t = dx0_t + A^T (s v_t * m_t)
///   dA = sum_t (s v_t * m_t) (x) x_t;   dBt = sum_t (s u_t * m_t) (x) dy_t
///
/// Shapes: a [R, d_in], bt [R, d_out]; u, mask m (0 = not selected) and dmask [T, R] of the accumulate type with rows
/// padded_rank(R) elements apart, pad columns of the mask 0; x, y0, y, dy, dx
/// of the dtype. Rows of dA and dBt of ranks that no token selects are exactly 0.
struct RankwiseAdapter {
  int64_t rank = 0, d_in = 0, d_out = 0;
  DType dtype = DType::kF32;
  const void* a = nullptr;
  const void* bt = nullptr;
  float scale = 1.0f;                           // s
  const int64_t* row_offsets_device = nullptr;  // {0, R} in device memory; CUDA only
};

struct RankwiseForward {
  const RankwiseAdapter* adapter = nullptr;
  int64_t tokens = 0;
  const void* u = nullptr;  // from rankwise_project
  const void* mask = nullptr;
  ConstRows y0;
  Rows y;
};

struct RankwiseBackward {
  const RankwiseAdapter* adapter = nullptr;
  int64_t tokens = 0;
  const void* u = nullptr;
  const void* mask = nullptr;
  ConstRows x, dy, dx0;
  Rows dx;
  void* dmask = nullptr;  // for every rank, selected or not
  void* da = nullptr;
  void* dbt = nullptr;
  bool accumulate = false;
};

size_t rankwise_workspace(const RankwiseAdapter& adapter, int64_t tokens, const Exec& exec);

/// u = x A^T, unrounded: selection reads these values.
void rankwise_project(const RankwiseAdapter& adapter, ConstRows x, int64_t tokens, void* u, Workspace workspace,
                      const Exec& exec);
/// mask[t, i] = 1 for the `keep` largest score[t, i] (|score| with by_magnitude), ties to the lower rank; else 0.
/// score and mask: rows of padded_rank(R) elements, accumulate type of dtype. Throws UserError unless 0 <= keep <= R,
/// or for a NaN score. CPU only.
void rankwise_select(const void* score, int64_t tokens, int64_t rank, int64_t keep, bool by_magnitude, DType dtype,
                     void* mask);
void rankwise_forward(const RankwiseForward& args, Workspace workspace, const Exec& exec);
void rankwise_backward(const RankwiseBackward& args, Workspace workspace, const Exec& exec);

}  // namespace moraine::kernels
