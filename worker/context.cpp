#include "worker/context.h"

#include <algorithm>
#include <cmath>

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <sys/resource.h>

#include "algorithms/arithmetic.h"
#include "core/error.h"
#include "core/log.h"
#include "worker/members.h"
#include "worker/trainer.h"

namespace moraine::worker {
namespace {

constexpr std::chrono::milliseconds kTick{250};
constexpr std::chrono::minutes kFetchDeadline{10};
constexpr size_t kRecordsPerMessage = 128;  // keeps a message's body well under its 64 KiB

// Why CUDA device `index` cannot be used; empty when it can. LibTorch's CUDA part is loaded on demand: linked in, it
// would more than triple the start time of every command on machines without a GPU.
std::string why_no_cuda(int index) {
  if (!c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA) &&
      dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    const char* reason = dlerror();
    return reason != nullptr ? reason : "libtorch_cuda.so cannot be loaded";
  }
  const int devices = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA)->deviceCount();
  if (devices == 0) return "LibTorch sees no CUDA device";
  if (index >= devices) {
    return fmt::format("this is working process {} of its host, which has {} CUDA devices; each process uses one",
                       index + 1, devices);
  }
  return "";
}

// What counts the device's memory; nullptr on the CPU, and while nothing was taken.
c10::DeviceAllocator* device_memory(const WorkerOptions& options) {
  if (options.device != "cuda") return nullptr;
  auto* allocator = c10::getDeviceAllocator(at::kCUDA);
  return allocator->initialized() ? allocator : nullptr;
}

}  // namespace

void check_options(const WorkerOptions& options) {
  if (options.threads < 1) {
    throw core::UserError(fmt::format("worker: threads must be positive: {}", options.threads),
                          "set workers.threads to 1 or more");
  }
  if (options.threads > kMostThreads) {
    throw core::UserError(fmt::format("worker: at most {} threads: {}", kMostThreads, options.threads),
                          "give it as many as there are processors");
  }
  algorithms::use_arithmetic(options.arithmetic);
  if (options.device == "cpu") return;
  if (options.device != "cuda") {
    throw core::UserError(fmt::format("worker: unknown device: '{}'", options.device),
                          "set workers.device to cpu or cuda");
  }
  const std::string reason = why_no_cuda(options.device_index);
  if (reason.empty()) {
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    return;
  }
  throw core::UserError(
      "worker: CUDA asked for but absent: " + reason,
      "set workers.device=cpu, run scripts/setup --cuda on a machine with a GPU and its driver, or start "
      "fewer processes per host");
}

at::Device WorkerOptions::cuda_device() const { return {at::kCUDA, static_cast<c10::DeviceIndex>(device_index)}; }

void send_or_throw(comm::Channel& channel, comm::Message message) {
  if (const auto sent = channel.send(0, std::move(message)); !sent.ok()) {
    throw core::CommError("worker: the coordinator cannot be reached: " + sent.error(),
                          "start the run again with the same command; finished units are kept");
  }
}

std::optional<comm::Message> receive_or_throw(comm::Channel& channel, std::chrono::milliseconds deadline) {
  auto received = channel.receive(deadline);
  if (!received.ok()) {
    throw core::CommError("worker: lost the coordinator: " + received.error(),
                          "start the run again with the same command; finished units are kept");
  }
  if (!received.value()) return std::nullopt;
  return std::move(received.value()->message);
}

UnitContext::UnitContext(const algorithms::Unit& unit, int64_t attempt, const WorkerOptions& options,
                         const std::atomic<int>& signals)
    : unit_(unit),
      unit_id_(unit.id()),
      attempt_(attempt),
      options_(options),
      signals_(signals),
      last_tick_(std::chrono::steady_clock::now()) {
  if (auto* memory = device_memory(options)) memory->resetPeakStats(options.cuda_device().index());
}

algorithms::TrainOutcome UnitContext::train(algorithms::TrainJob job) {
  const int64_t training = trainings_++;
  TrainSite site;
  site.job = fmt::format("{}/{}", unit_id_, training);
  site.label = unit_.label;
  site.checkpoint = checkpoint_path(training);
  site.metric = [this](const core::metrics::Record& record) { metric(record.key, record.step, record.value); };
  site.progress = [this](double done, double total) {
    done_ = done;
    total_ = total;
    progress_pending_ = true;
  };
  site.stop_requested = [this] {
    tick();
    return stop_requested();
  };
  site.after_step = [this](int64_t step) { options_.faults.after_step(unit_.label, step, group().index() == 0); };
  site.group = options_.group;
  site.exchange = options_.exchange;
  site.nan_in_first_step = training == 0 && options_.faults.nan_loss(unit_.label, attempt_);
  TrainResult result = worker::train(job, site);
  train_seconds_ += result.seconds;
  trained_tokens_ += result.tokens;
  resumed_steps_ += result.resumed_at;
  optimizer_bytes_ = std::max(optimizer_bytes_, result.optimizer_bytes);
  return std::move(result.outcome);
}

void UnitContext::metric(const std::string& key, int64_t step, double value) {
  if (!std::isfinite(value)) {
    core::log::warn("metric dropped, not finite: unit={} key={} step={}", unit_.label, key, step);
    return;
  }
  records_.push_back({unit_.label, key, step, value});
}

void UnitContext::progress(double done, double total) {
  done_ = done;
  total_ = total;
  progress_pending_ = true;
  tick();
  if (stop_requested()) throw_stopped();
  if (auto others = group().poll(); !others.ok()) throw GroupFailed(others.error());
}

void UnitContext::throw_stopped() const {
  throw core::StopRequested(fmt::format("worker: stopped during {}", unit_.label));
}

at::Device UnitContext::device() const {
  return options_.device == "cuda" ? options_.cuda_device() : at::Device(at::kCPU);
}

std::shared_ptr<void> UnitContext::cached(const std::string& key, const std::function<std::shared_ptr<void>()>& make) {
  return options_.objects->get(key, make);
}

void UnitContext::tick() {
  const auto now = std::chrono::steady_clock::now();
  if (now - last_tick_ < kTick) return;
  last_tick_ = now;
  flush();
  if (!stop_) stop_ = poll_stop();
}

void UnitContext::flush() {
  if (!records_.empty()) send_metrics(records_);
  records_.clear();
  if (progress_pending_) send_progress(done_, total_);
  progress_pending_ = false;
}

std::filesystem::path UnitContext::checkpoint_path(int64_t training) const {
  if (options_.checkpoint_directory.empty()) return {};
  return options_.checkpoint_directory / fmt::format("{}-{}.safetensors", unit_id_, training);
}

std::vector<std::filesystem::path> UnitContext::checkpoints() const {
  std::vector<std::filesystem::path> paths;
  if (options_.checkpoint_directory.empty()) return paths;
  for (int64_t training = 0; training < trainings_; ++training) paths.push_back(checkpoint_path(training));
  return paths;
}

core::Json UnitContext::stats() const {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  core::Json stats = {{"train_seconds", train_seconds_},
                      {"trained_tokens", trained_tokens_},
                      {"resumed_steps", resumed_steps_},
                      {"optimizer_bytes", optimizer_bytes_},
                      {"peak_rss_bytes", int64_t{usage.ru_maxrss} * 1024}};
  if (auto* memory = device_memory(options_)) {
    const auto bytes = memory->getDeviceStats(options_.cuda_device().index()).allocated_bytes;
    stats["peak_device_bytes"] = bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  }
  return stats;
}

ChannelContext::ChannelContext(const algorithms::Unit& unit, int64_t attempt, const WorkerOptions& options,
                               const std::atomic<int>& signals, comm::Channel& channel, ArtefactCache& artefacts)
    : UnitContext(unit, attempt, options, signals), channel_(channel), artefacts_(artefacts) {}

core::ArtefactPtr ChannelContext::artefact(const std::string& id) {
  if (const auto found = artefacts_.find(id)) return *found;
  core::ArtefactPtr artefact = fetch(id);
  if (group().size() > 1) {
    core::Bytes bytes = artefact->bytes();
    if (auto sent = group().broadcast(bytes, group_deadline()); !sent.ok()) throw GroupFailed(sent.error());
  }
  artefacts_.insert(id, artefact, artefact->bytes().size());
  return artefact;
}

core::ArtefactPtr ChannelContext::fetch(const std::string& id) {
  send_or_throw(channel_, {comm::MessageType::kFetch, {{"artefact", id}}, {}});
  const auto deadline = std::chrono::steady_clock::now() + kFetchDeadline;
  while (std::chrono::steady_clock::now() < deadline) {
    std::optional<comm::Message> message = receive_or_throw(channel_, kTick);
    if (message && message->type == comm::MessageType::kStop) stop_reason_ = message->body.value("reason", "stop");
    if (stop_reason_ || stop_requested()) throw_stopped();
    if (!message) continue;
    if (message->type == comm::MessageType::kArtefact && message->body.value("artefact", "") == id) {
      if (message->body.contains("error")) {
        throw core::IoError("worker: the coordinator cannot send an input: " + message->body.value("error", ""));
      }
      return core::Artefact::parse(std::move(message->payload), id, "coordinator");
    }
    throw core::CommError(fmt::format("worker: the coordinator answered a fetch with message {}: {}",
                                      static_cast<int>(message->type), message->body.value("text", id)));
  }
  throw core::CommError("worker: the coordinator did not send an input within ten minutes: " + id,
                        "look at the coordinator's log and start the run again with the same command");
}

void ChannelContext::send_metrics(const std::vector<core::metrics::Record>& records) {
  for (size_t first = 0; first < records.size(); first += kRecordsPerMessage) {
    core::Json list = core::Json::array();
    for (size_t i = first; i < std::min(records.size(), first + kRecordsPerMessage); ++i) {
      const auto& [unit, key, step, value] = records[i];
      list.push_back({{"unit", unit}, {"key", key}, {"step", step}, {"value", value}});
    }
    send_or_throw(channel_, {comm::MessageType::kMetrics, {{"records", std::move(list)}}, {}});
  }
}

void ChannelContext::send_progress(double done, double total) {
  send_or_throw(channel_,
                {comm::MessageType::kProgress, {{"unit", unit().id()}, {"done", done}, {"total", total}}, {}});
}

bool ChannelContext::poll_stop() {
  if (stop_reason_) return true;
  const std::optional<comm::Message> message = receive_or_throw(channel_, std::chrono::milliseconds(0));
  if (!message) return false;
  if (message->type != comm::MessageType::kStop) {
    throw core::CommError(
        fmt::format("worker: unexpected message {} while {} runs", static_cast<int>(message->type), unit().label));
  }
  stop_reason_ = message->body.value("reason", "stop");
  return true;
}

MemberContext::MemberContext(const algorithms::Unit& unit, int64_t attempt, const WorkerOptions& options,
                             const std::atomic<int>& signals, ChannelContext::ArtefactCache& artefacts)
    : UnitContext(unit, attempt, options, signals), artefacts_(artefacts) {}

core::ArtefactPtr MemberContext::artefact(const std::string& id) {
  if (const auto found = artefacts_.find(id)) return *found;
  core::Bytes bytes;
  const auto came = group().broadcast(bytes, group_deadline());
  if (!came.ok()) throw GroupFailed(came.error());
  if (!came.value()) throw GroupFailed("the leader did not send an input in time: " + id);
  core::ArtefactPtr artefact = core::Artefact::parse(std::move(bytes), id, "the leader of the group");
  artefacts_.insert(id, artefact, artefact->bytes().size());
  return artefact;
}

DirectContext::DirectContext(const algorithms::Unit& unit, int64_t attempt, const WorkerOptions& options,
                             const std::atomic<int>& signals, Hooks hooks)
    : UnitContext(unit, attempt, options, signals), hooks_(std::move(hooks)) {}

core::ArtefactPtr DirectContext::artefact(const std::string& id) { return hooks_.artefact(id); }

void DirectContext::send_metrics(const std::vector<core::metrics::Record>& records) {
  for (const auto& record : records) hooks_.metric(record);
}

void DirectContext::send_progress(double done, double total) { hooks_.progress(done, total); }

bool DirectContext::poll_stop() { return hooks_.stop_requested(); }

}  // namespace moraine::worker
