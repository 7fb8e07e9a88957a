// Ragged-rank expert kernels against every way of doing the same with ATen, on the CPU, all in one run: O1 the low-rank
// delta of a linear map (ragged_delta.cpp), O2 the FFN expert (ragged_ffn.cpp), O3 rank-wise activation
// (ragged_rankwise.cpp), O4 experts of full size and factors multiplied out (ragged_dense.cpp).
//
// Contenders run interleaved (ours B1 B2 .. ours B1 B2 ..), medians are printed as a Markdown table, ratios are
// baseline / ours; peaks are measured before and after. One thread is timed by its processor time, several by the wall
// clock. The floor of a line is max(FLOP / measured FMA peak, bytes / measured read bandwidth).
//   B1 per-expert loop: index_select, mm, mm, mul, index_add     B2 zero-pad to the largest rank and token count, two
//   bmm B3 as PEFT does it: dtype casts and boolean indexing         B5 all ranks for all tokens, masked B6 one dense
//   matrix per expert                               B7 the frozen layer alone (context, not a contender)
// B4 (grouped_mm) exists on GPUs only and prints n/a.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <omp.h>
#include <CLI/CLI.hpp>

#include "bench/ragged_bench.h"

int main(int argc, char** argv) {
  CLI::App app{"Ragged-rank expert kernels against ATen"};
  int threads = 1;
  double budget_s = 1.0;
  std::vector<int64_t> tokens{1, 16, 64, 256};
  std::vector<std::string> operations{"O1"}, sets, dtypes{"fp32", "bf16"}, routings{"uniform"},
      directions{"fwd", "fwd+bwd"};
  int64_t experts = 8, slots = 2, d_in = 4096, d_out = 4096;
  bool few = false;
  app.add_option("--operation", operations, "O1, O2, O3, O4")->check(CLI::IsMember({"O1", "O2", "O3", "O4"}));
  app.add_option("--threads", threads, "threads for all contenders (1 is the primary number)");
  app.add_option("--tokens", tokens, "tokens per call");
  app.add_option("--ranks", sets, "names of rank sets; all when absent");
  app.add_option("--dtype", dtypes, "fp32, bf16");
  app.add_option("--routing", routings, "uniform, zipf, one");
  app.add_option("--direction", directions, "fwd, fwd+bwd");
  app.add_option("--experts", experts);
  app.add_option("--slots", slots);
  app.add_option("--d-in", d_in, "O2: the model's width");
  app.add_option("--d-out", d_out, "O2: the hidden width");
  app.add_option("--budget", budget_s, "seconds per cell");
  app.add_flag("--few", few, "O1: only B1, B3 and B7");
  CLI11_PARSE(app, argc, argv);
  at::set_num_threads(threads);
  omp_set_num_threads(threads);
  bench::use_cpu_time(threads == 1);
  std::printf("Path %s, threads %d, %s time.\n\n```\n%s```\n\n",
              moraine::kernels::path_name(moraine::kernels::best_path()), threads,
              bench::uses_cpu_time() ? "processor" : "wall", at::show_config().c_str());
  const bench::Peaks peaks = bench::measure_peaks("before", threads);
  std::printf("\n");
  bench::print_header();
  for (const std::string& operation : operations)
    for (const std::string& dtype : dtypes) {
      const bench::RankSet* first = nullptr;  // operations without ranks run once
      for (const bench::RankSet& set : bench::rank_sets()) {
        if (!sets.empty() && std::find(sets.begin(), sets.end(), set.name) == sets.end()) continue;
        if (first == nullptr) first = &set;
        if (operation == "O3" && &set != first) continue;
        if (operation == "O4")
          bench::run_materialise(
              {0, experts, 0, d_in, d_out, set, "", dtype == "fp32" ? at::kFloat : at::kBFloat16, false, few, budget_s},
              peaks);
        const int64_t e = set.name.rfind("flexmore", 0) == 0 ? 7 : set.name == "ladder" ? 12 : experts;
        for (const std::string& routing : routings)
          for (const int64_t t : tokens)
            for (const std::string& direction : directions) {
              const bench::Request request{t,
                                           e,
                                           slots,
                                           d_in,
                                           d_out,
                                           set,
                                           routing,
                                           dtype == "fp32" ? at::kFloat : at::kBFloat16,
                                           direction == "fwd+bwd",
                                           few,
                                           budget_s};
              if (operation == "O1") bench::run_delta(request, peaks);
              if (operation == "O2") bench::run_ffn(request, peaks);
              if (operation == "O3") bench::run_rankwise(request, peaks);
              if (operation == "O4" && &set == first) bench::run_dense(request, peaks);
            }
      }
    }
  std::printf("\n");
  bench::measure_peaks("after", threads);
  return 0;
}
