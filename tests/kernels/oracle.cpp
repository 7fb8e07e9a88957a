#include "tests/kernels/oracle.h"

#include <cmath>

namespace moraine::kernels::test {
namespace {
size_t at(int64_t i) { return static_cast<size_t>(i); }
double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
}  // namespace

std::vector<int64_t> Experts::offsets() const {
  std::vector<int64_t> out{0};
  for (const int64_t r : ranks) out.push_back(out.back() + r);
  return out;
}

Vec apply_expert(const Experts& x, int64_t e, const double* in) {
  Vec out(at(x.d_out), 0.0);
  const int64_t first = x.offsets()[at(e)];
  for (int64_t i = 0; i < x.ranks[at(e)]; ++i) {
    double u = 0;
    for (int64_t c = 0; c < x.d_in; ++c) u += x.a[at((first + i) * x.d_in + c)] * in[c];
    if (x.dense) {
      out[at(i)] = u;
    } else {
      for (int64_t c = 0; c < x.d_out; ++c) out[at(c)] += u * x.bt[at((first + i) * x.d_out + c)];
    }
  }
  return out;
}

Vec expert_backward(const Experts& x, int64_t e, const double* in, const double* dout, double weight,
                    DeltaGrads& grads) {
  Vec din(at(x.d_in), 0.0);
  const int64_t first = x.offsets()[at(e)];
  for (int64_t i = 0; i < x.ranks[at(e)]; ++i) {
    double u = 0, v = 0;
    for (int64_t c = 0; c < x.d_in; ++c) u += x.a[at((first + i) * x.d_in + c)] * in[c];
    if (x.dense) {
      v = dout[i];
    } else {
      for (int64_t c = 0; c < x.d_out; ++c) v += x.bt[at((first + i) * x.d_out + c)] * dout[c];
      for (int64_t c = 0; c < x.d_out; ++c) grads.dbt[at((first + i) * x.d_out + c)] += weight * u * dout[c];
    }
    for (int64_t c = 0; c < x.d_in; ++c) {
      grads.da[at((first + i) * x.d_in + c)] += weight * v * in[c];
      din[at(c)] += x.a[at((first + i) * x.d_in + c)] * v;
    }
  }
  return din;
}

Vec delta_forward(const Experts& x, const Routing& r, const Vec& in, const Vec& y0) {
  Vec y = y0;
  for (int64_t p = 0; p < r.tokens * r.slots; ++p) {
    const int64_t e = r.index[at(p)], t = p / r.slots;
    if (e < 0) continue;
    const Vec out = apply_expert(x, e, &in[at(t * x.d_in)]);
    for (int64_t c = 0; c < x.d_out; ++c) y[at(t * x.d_out + c)] += r.gates[at(p)] * x.scale[at(e)] * out[at(c)];
  }
  return y;
}

DeltaGrads delta_backward(const Experts& x, const Routing& r, const Vec& in, const Vec& dy, const Vec& dx0) {
  DeltaGrads g{dx0, Vec(x.a.size(), 0.0), Vec(x.bt.size(), 0.0), Vec(r.gates.size(), 0.0)};
  for (int64_t p = 0; p < r.tokens * r.slots; ++p) {
    const int64_t e = r.index[at(p)], t = p / r.slots;
    if (e < 0) continue;
    const double s = x.scale[at(e)], w = r.gates[at(p)] * s;
    const Vec out = apply_expert(x, e, &in[at(t * x.d_in)]);
    for (int64_t c = 0; c < x.d_out; ++c) g.dgates[at(p)] += s * out[at(c)] * dy[at(t * x.d_out + c)];
    const Vec din = expert_backward(x, e, &in[at(t * x.d_in)], &dy[at(t * x.d_out)], w, g);
    for (int64_t c = 0; c < x.d_in; ++c) g.dx[at(t * x.d_in + c)] += w * din[at(c)];
  }
  return g;
}

GradMagnitudes delta_backward_magnitudes(const Experts& x, const Routing& r, const Vec& in, const Vec& dy) {
  const DeltaGrads zeros{{}, Vec(x.a.size(), 0.0), Vec(x.bt.size(), 0.0), Vec(r.gates.size(), 0.0)};
  GradMagnitudes m{zeros, zeros};
  const std::vector<int64_t> offsets = x.offsets();
  for (int64_t p = 0; p < r.tokens * r.slots; ++p) {
    const int64_t e = r.index[at(p)], t = p / r.slots;
    if (e < 0) continue;
    const double s = x.scale[at(e)], w = std::abs(r.gates[at(p)]) * s;
    const double *xt = &in[at(t * x.d_in)], *dyt = &dy[at(t * x.d_out)];
    for (int64_t i = offsets[at(e)]; i < offsets[at(e + 1)]; ++i) {
      double u = 0, v = 0, u_terms = 0, v_terms = 0;
      for (int64_t c = 0; c < x.d_in; ++c) {
        const double term = x.a[at(i * x.d_in + c)] * xt[c];
        u += term, u_terms += std::abs(term);
      }
      if (x.dense) {
        v = dyt[i - offsets[at(e)]], v_terms = std::abs(v);
      } else {
        for (int64_t c = 0; c < x.d_out; ++c) {
          const double term = x.bt[at(i * x.d_out + c)] * dyt[c];
          v += term, v_terms += std::abs(term);
        }
        for (int64_t c = 0; c < x.d_out; ++c) {
          m.stored.dbt[at(i * x.d_out + c)] += w * std::abs(u * dyt[c]);
          m.summed.dbt[at(i * x.d_out + c)] += w * u_terms * std::abs(dyt[c]);
        }
      }
      for (int64_t c = 0; c < x.d_in; ++c) {
        m.stored.da[at(i * x.d_in + c)] += w * std::abs(v * xt[c]);
        m.summed.da[at(i * x.d_in + c)] += w * v_terms * std::abs(xt[c]);
      }
      m.stored.dgates[at(p)] += s * std::abs(u * v);
      m.summed.dgates[at(p)] += s * (u_terms * std::abs(v) + std::abs(u) * v_terms);
    }
  }
  return m;
}

namespace {
struct Activation {
  Vec a, b, h;
};
Activation activate(const Ffn& x, int64_t e, const double* in, const double* gate_base, const double* up_base) {
  Activation out{apply_expert(x.gate, e, in), apply_expert(x.up, e, in), Vec(at(x.gate.d_out))};
  for (size_t c = 0; c < out.h.size(); ++c) {
    out.a[c] = gate_base[c] + x.gate.scale[at(e)] * out.a[c];
    out.b[c] = up_base[c] + x.up.scale[at(e)] * out.b[c];
    out.h[c] = out.a[c] * sigmoid(out.a[c]) * out.b[c];
  }
  return out;
}
}  // namespace

FfnOut ffn_forward(const Ffn& x, const Routing& r, const Vec& in, const Vec& gate_base, const Vec& up_base) {
  const int64_t d = x.gate.d_in, f = x.gate.d_out;
  FfnOut out{Vec(at(r.tokens * f), 0.0), Vec(at(r.tokens * d), 0.0)};
  for (int64_t p = 0; p < r.tokens * r.slots; ++p) {
    const int64_t e = r.index[at(p)], t = p / r.slots;
    if (e < 0) continue;
    const Activation act = activate(x, e, &in[at(t * d)], &gate_base[at(t * f)], &up_base[at(t * f)]);
    const Vec y = apply_expert(x.down, e, act.h.data());
    for (int64_t c = 0; c < f; ++c) out.hidden_sum[at(t * f + c)] += r.gates[at(p)] * act.h[at(c)];
    for (int64_t c = 0; c < d; ++c) out.y_delta[at(t * d + c)] += r.gates[at(p)] * x.down.scale[at(e)] * y[at(c)];
  }
  return out;
}

FfnGrads ffn_backward(const Ffn& x, const Routing& r, const Vec& in, const Vec& gate_base, const Vec& up_base,
                      const Vec& dy, const Vec& q) {
  const int64_t d = x.gate.d_in, f = x.gate.d_out;
  const auto zeros = [](const Experts& part) {
    return DeltaGrads{{}, Vec(part.a.size(), 0.0), Vec(part.bt.size(), 0.0), {}};
  };
  FfnGrads g{Vec(at(r.tokens * f), 0.0),
             Vec(at(r.tokens * f), 0.0),
             Vec(at(r.tokens * d), 0.0),
             Vec(r.gates.size(), 0.0),
             zeros(x.gate),
             zeros(x.up),
             zeros(x.down)};
  for (int64_t p = 0; p < r.tokens * r.slots; ++p) {
    const int64_t e = r.index[at(p)], t = p / r.slots;
    if (e < 0) continue;
    const double gate = r.gates[at(p)], s_down = x.down.scale[at(e)];
    const Activation act = activate(x, e, &in[at(t * d)], &gate_base[at(t * f)], &up_base[at(t * f)]);
    const Vec y = apply_expert(x.down, e, act.h.data());
    for (int64_t c = 0; c < f; ++c) g.dgates[at(p)] += act.h[at(c)] * q[at(t * f + c)];
    for (int64_t c = 0; c < d; ++c) g.dgates[at(p)] += s_down * y[at(c)] * dy[at(t * d + c)];
    const Vec low_rank = expert_backward(x.down, e, act.h.data(), &dy[at(t * d)], gate * s_down, g.down);
    Vec da(at(f)), db(at(f));
    for (int64_t c = 0; c < f; ++c) {
      const double dh = gate * (q[at(t * f + c)] + s_down * low_rank[at(c)]), sg = sigmoid(act.a[at(c)]);
      da[at(c)] = dh * act.b[at(c)] * sg * (1 + act.a[at(c)] * (1 - sg));
      db[at(c)] = dh * act.a[at(c)] * sg;
      g.dgate_base[at(t * f + c)] += da[at(c)];
      g.dup_base[at(t * f + c)] += db[at(c)];
    }
    const double s_gate = x.gate.scale[at(e)], s_up = x.up.scale[at(e)];
    const Vec from_gate = expert_backward(x.gate, e, &in[at(t * d)], da.data(), s_gate, g.gate);
    const Vec from_up = expert_backward(x.up, e, &in[at(t * d)], db.data(), s_up, g.up);
    for (int64_t c = 0; c < d; ++c) g.dx_delta[at(t * d + c)] += s_gate * from_gate[at(c)] + s_up * from_up[at(c)];
  }
  return g;
}

Vec rankwise_forward(const Vec& a, const Vec& bt, int64_t tokens, int64_t rank, int64_t d_in, int64_t d_out,
                     double scale, const Vec& in, const Vec& mask, const Vec& y0) {
  Vec y = y0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < rank; ++i) {
      double u = 0;
      for (int64_t c = 0; c < d_in; ++c) u += a[at(i * d_in + c)] * in[at(t * d_in + c)];
      for (int64_t c = 0; c < d_out; ++c)
        y[at(t * d_out + c)] += scale * u * mask[at(t * rank + i)] * bt[at(i * d_out + c)];
    }
  return y;
}

RankwiseGrads rankwise_backward(const Vec& a, const Vec& bt, int64_t tokens, int64_t rank, int64_t d_in, int64_t d_out,
                                double scale, const Vec& in, const Vec& mask, const Vec& dy) {
  RankwiseGrads g{Vec(at(tokens * d_in), 0.0), Vec(a.size(), 0.0), Vec(bt.size(), 0.0), Vec(at(tokens * rank), 0.0)};
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < rank; ++i) {
      double u = 0, v = 0;
      for (int64_t c = 0; c < d_in; ++c) u += a[at(i * d_in + c)] * in[at(t * d_in + c)];
      for (int64_t c = 0; c < d_out; ++c) v += bt[at(i * d_out + c)] * dy[at(t * d_out + c)];
      const double m = scale * mask[at(t * rank + i)];
      g.dmask[at(t * rank + i)] = scale * u * v;
      for (int64_t c = 0; c < d_in; ++c) {
        g.da[at(i * d_in + c)] += m * v * in[at(t * d_in + c)];
        g.dx[at(t * d_in + c)] += m * v * a[at(i * d_in + c)];
      }
      for (int64_t c = 0; c < d_out; ++c) g.dbt[at(i * d_out + c)] += m * u * dy[at(t * d_out + c)];
    }
  return g;
}

}  // namespace moraine::kernels::test
