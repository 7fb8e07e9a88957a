#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "algorithms/method.h"
#include "algorithms/worker_context.h"
#include "comm/channel.h"

namespace moraine::worker::testing {

/// A method whose units do what the test says.
class ScriptedMethod : public algorithms::Method {
 public:
  explicit ScriptedMethod(std::function<void(algorithms::WorkerContext&)> body) : body_(std::move(body)) {}
  void open_inputs() override {}
  core::Json inputs() const override { return {}; }
  algorithms::Plan plan(const algorithms::RunState&) const override { return {}; }
  core::ArtefactPtr execute(const algorithms::Unit& unit, algorithms::WorkerContext& context) const override {
    body_(context);
    return core::Artefact::create("test", {{"label", unit.label}}, {});
  }
  core::Json summary(const algorithms::RunState&) const override { return {}; }
  void publish(const algorithms::RunState&, const std::filesystem::path&) const override {}
  algorithms::ParameterTable parameters() const override { return {}; }

 private:
  std::function<void(algorithms::WorkerContext&)> body_;
};

inline algorithms::Unit unit_called(const std::string& label) {
  algorithms::Unit unit;
  unit.kind = "test";
  unit.label = label;
  unit.spec = {{"label", label}};
  return unit;
}

/// What has reached the coordinator's end so far.
inline std::vector<comm::Message> heard(comm::Channel& coordinator) {
  std::vector<comm::Message> messages;
  while (true) {
    auto received = coordinator.receive(std::chrono::milliseconds(0));
    if (!received.ok() || !received.value()) return messages;
    messages.push_back(std::move(received.value()->message));
  }
}

}  // namespace moraine::worker::testing
