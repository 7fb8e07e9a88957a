#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/unit.h"
#include "core/artefact.h"
#include "core/config.h"
#include "core/json.h"

namespace moraine::algorithms {

class WorkerContext;  // algorithms/worker_context.h: what a worker offers to execute()

/// Exact parameter counts of a recipe on shapes alone: rows of a table, computed in closed form.
struct ParameterTable {
  std::vector<std::string> columns;           // first column names the row
  std::vector<std::vector<core::Json>> rows;  // strings and integers
  std::vector<std::string> notes;
};

/// What `moraine export` asks of a method.
struct ExportRequest {
  std::string format;                // peft | hf | flexolmo | olmo_core
  std::filesystem::path directory;   // empty or not there yet
  std::string what;                  // which result; "" = the main one. The method's error lists what it has
  std::vector<std::string> experts;  // only these parts of it; empty = all
  std::string base_model;  // name of the base model for adapters; "" = what the method knows, which may be nothing
  std::string dtype;       // float32 | bfloat16; "" = as stored, where types mix the widest: nothing is rounded
};

/// A whole procedure, transport-free. plan() is pure: the same accepted results give the same plan.
/// Thread-safe: execute() runs on several worker threads at once on one object.
class Method {
 public:
  virtual ~Method() = default;
  /// Looks at the files the recipe names: fingerprints of data, identity of the model. Called once, before plan();
  /// never for parameters(). Throws UserError naming file and key.
  virtual void open_inputs() = 0;
  /// What open_inputs() found, enough to plan and report later without the files (MethodEntry::restore).
  virtual core::Json inputs() const = 0;
  virtual Plan plan(const RunState& state) const = 0;
  /// Runs one unit. Throws core::Error; the coordinator retries the unit elsewhere.
  virtual core::ArtefactPtr execute(const Unit& unit, WorkerContext& context) const = 0;
  /// Whether `artefact` can be what execute() made of `unit`: names, shapes, counts, values in range. Called by the
  /// coordinator before a result is accepted. Throws UserError naming what is wrong; that attempt has failed then
  /// (problem kind "artefact"), not the run.
  virtual void check_result(const Unit&, const core::Artefact&) const {}
  /// Which result a run with nothing pending should have and has not, as one sentence; nullopt when all is there. Such
  /// a run ends with that sentence and an exit code other than 0.
  virtual std::optional<std::string> missing_result(const RunState&) const { return std::nullopt; }
  /// Tables, curves and pictures of a finished (or unfinished) run as JSON; docs/formats.md, "summary.json".
  virtual core::Json summary(const RunState& state) const = 0;
  /// Writes what other tools read (a Hugging Face directory, PEFT directories) into the run directory of a finished
  /// run.
  virtual void publish(const RunState& state, const std::filesystem::path& run_directory) const = 0;
  /// Writes a result in a format of other tools. The default throws the UserError of a method that has no such form; a
  /// method whose result is a LoRA hands its artefact to adapters::export_adapter().
  virtual void export_as(const RunState& state, const ExportRequest& request) const;
  /// Parameter counts from shapes alone. No weights are read.
  virtual ParameterTable parameters() const = 0;
};

}  // namespace moraine::algorithms
