// Exact parameter counts from shapes alone; no weight is read. Source: FlexMoRE (arXiv 2602.08818), "Parameter counts".
#include <algorithm>

#include "algorithms/flexmore/direct.h"
#include "algorithms/flexmore/flexmore.h"

namespace moraine::algorithms::flexmore {

ParameterTable FlexMore::parameters() const {
  const auto& a = architecture_;
  const auto experts = static_cast<int64_t>(members_.size());
  const int64_t shared = a.shared_parameters(), ffn = a.ffn_parameters();
  const int64_t dense = shared + ffn;
  const auto mixture = [&](int64_t count, int64_t each) {
    return dense + a.router_parameters(count + 1) + count * each;
  };
  const auto share = [&](int64_t parameters) {
    return 100.0 * static_cast<double>(parameters) / static_cast<double>(ffn);
  };

  ParameterTable table;
  table.columns = {"model",
                   "rank",
                   "expert parameters",
                   "% of a full expert",
                   "2-expert total",
                   fmt::format("{}-expert total", experts + 1)};
  const auto row = [&](const std::string& name, core::Json rank, int64_t each) {
    table.rows.push_back({name, std::move(rank), each, share(each), mixture(1, each), mixture(experts, each)});
  };
  table.rows.push_back({"public model", nullptr, 0, 0.0, dense, dense});
  const int64_t smallest = std::min(a.hidden_size, a.intermediate_size);
  for (int64_t rank = 1; rank <= smallest; rank *= 2) row("low-rank experts", rank, a.low_rank_parameters(rank));
  row("full-size experts", "full", ffn);

  // The recipe's own experts, as far as their ranks are fixed.
  int64_t own = dense + a.router_parameters(experts + 1);
  bool open = false;
  for (const auto& d : members_) {
    open |= chooses_rank(d);
    // A rank that is still open may become the largest there is.
    const int64_t rank = chooses_rank(d) ? trained_rank(d) : fixed_rank(d);
    own += rank > 0 ? a.low_rank_parameters(rank) : ffn;
  }
  if (!members_.empty())
    table.rows.push_back({"this recipe" + std::string(open ? " (rank: auto counted as it is trained)" : ""), nullptr,
                          nullptr, nullptr, nullptr, own});
  if (experts == 1) {  // the two columns of totals are one
    constexpr ptrdiff_t kTotal = 4;
    table.columns.erase(table.columns.begin() + kTotal);
    for (auto& cells : table.rows) cells.erase(cells.begin() + kTotal);
  }
  const double d = static_cast<double>(a.hidden_size), h = static_cast<double>(a.intermediate_size);
  table.notes = {
      fmt::format("shared (embeddings, attention, norms, head): {}; one full FFN: {}; router: {} per expert; one unit "
                  "of rank: {}",
                  shared, ffn, a.router_parameters(1), a.low_rank_parameters(1)),
      fmt::format("break-even rank d h / (d + h) = {:.1f}: above it a factored expert is larger than a full-size one",
                  d * h / (d + h))};
  for (const auto& member : members_)
    if (member.adapter)
      table.notes.push_back(fmt::format(
          "expert {}: {} trains {} numbers; as an expert {} are sent ({}), beside {} of the router", member.name,
          member.adapter->type, adapter_counts(*member.adapter, a).trained,
          trains_factors(member) ? a.low_rank_parameters(trained_rank(member)) : ffn,
          trains_factors(member) ? fmt::format("rank {}", trained_rank(member)) : "full-size", a.router_parameters(1)));
  return table;
}

}  // namespace moraine::algorithms::flexmore
