// A second device of torch for tests: its memory is the host's, its numbers are computed by the CPU's kernels, and, as
// on a GPU, an operation refuses tensors of both devices, and process groups of the device refuse tensors of the CPU.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/extension.h>

#include <cstdlib>
#include <mutex>
#include <set>

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
constexpr auto KEY = c10::DispatchKey::PrivateUse1;

void release(void* memory) { std::free(memory); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? std::malloc(bytes) : nullptr;
    return {memory, memory, &release, c10::Device(TYPE, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

std::mutex pinned_lock;
std::set<const void*> pinned;

void unpin(void* block) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  pinned.erase(block);
  std::free(block);
}

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* block = std::malloc(bytes ? bytes : 1);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.insert(block);
    return {block, block, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Pinned pinned_memory;

bool is_pinned(const at::Tensor& tensor) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  return pinned.count(tensor.storage().data()) > 0;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> guard(pinned_lock);
    return pinned.count(data) > 0;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(TYPE, 0); }
  c10::Device getDevice() const override { return c10::Device(TYPE, 0); }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, c10::Device(TYPE, 0)); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// The same memory as a tensor of the CPU.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (tensor.device().type() != TYPE) return tensor;
  auto options = tensor.options().device(c10::DeviceType::CPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(KEY), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(KEY),
                                           c10::dtype_or_default(dtype));
}

// Copies into pinned memory that nobody has waited for yet. Until then, the copy has other numbers.
std::mutex late_lock;
std::vector<std::pair<at::Tensor, at::Tensor>> late;
int64_t number_late = 0;

void finish() {
  std::lock_guard<std::mutex> guard(late_lock);
  for (auto& [from, to] : late) to.copy_(from);
  late.clear();
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (non_blocking && to.is_cpu() && to.numel() && is_pinned(to)) {
    std::lock_guard<std::mutex> guard(late_lock);
    to.fill_(77);
    late.emplace_back(on_cpu(from).clone(), to);
    ++number_late;
    return to;
  }
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& set_storage(at::Tensor& result, at::Storage storage, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(result, storage, offset, size, stride);
}

at::Tensor moved(const at::Tensor& tensor) { return tensor.defined() ? tensor.to(c10::Device(TYPE, 0)) : tensor; }

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                       bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  std::optional<at::Tensor> bias;
  if (b.has_value() && b->defined()) bias = on_cpu(*b);
  return moved(at::convolution_symint(on_cpu(x), on_cpu(w), bias, stride, padding, dilation, transposed,
                                      output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& g, const at::Tensor& x, const at::Tensor& w, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  c10::SymInt channels = transposed ? w.sym_size(1) * groups : w.sym_size(0);
  auto made = at::convolution_backward_symint(on_cpu(g), on_cpu(x), on_cpu(w), c10::SymIntArrayRef(channels), stride,
                                              padding, dilation, transposed, output_padding, groups, wanted);
  return {moved(std::get<0>(made)), moved(std::get<1>(made)), moved(std::get<2>(made))};
}

void look_at(const at::Tensor& tensor, bool& here, bool& there) {
  if (!tensor.defined()) return;
  if (tensor.device().type() == TYPE) here = true;
  else if (tensor.device().is_cpu() && tensor.dim() > 0) there = true;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool here = false, there = false;
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) look_at(value.toTensor(), here, there);
    else if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorList()) look_at(tensor, here, there);
    else if (value.isOptionalTensorList())
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        if (tensor.has_value()) look_at(*tensor, here, there);
  }
  const std::string& name = op.schema().name();
  bool indexing = name.find("aten::index") == 0 || name.find("aten::_index") == 0;  // CUDA takes indices of the CPU
  TORCH_CHECK(!(here && there) || indexing, name, ": expected all tensors to be on the same device, but found both");
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

using Work = c10::intrusive_ptr<c10d::Work>;
using Tensors = std::vector<at::Tensor>;

// Sends the memory of the device's tensors by a backend of the CPU, and refuses those of the CPU; or the reverse, as
// gloo, which would take the address of any tensor for one of the host.
struct Relay final : c10d::Backend {
  Relay(c10::intrusive_ptr<c10d::Backend> inner, bool on_device)
      : Backend(inner->getRank(), inner->getSize()), inner(std::move(inner)), on_device(on_device) {}

  c10::intrusive_ptr<c10d::Backend> inner;
  bool on_device;

  Tensors all_on_cpu(const Tensors& tensors) const {
    Tensors found;
    for (const auto& tensor : tensors) {
      bool here = tensor.device().type() == TYPE;
      TORCH_CHECK(here == on_device, "this process group has no tensors of ", tensor.device());
      found.push_back(on_cpu(tensor));
    }
    return found;
  }

  std::vector<Tensors> lists_on_cpu(const std::vector<Tensors>& lists) const {
    std::vector<Tensors> found;
    for (const auto& tensors : lists) found.push_back(all_on_cpu(tensors));
    return found;
  }

  const std::string getBackendName() const override { return "relay"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return inner->getBackendOptions(); }
  void setSequenceNumberForGroup() override { inner->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner->getSequenceNumberForGroup(); }

  Work broadcast(Tensors& t, const c10d::BroadcastOptions& o) override {
    auto c = all_on_cpu(t);
    return inner->broadcast(c, o);
  }
  Work allreduce(Tensors& t, const c10d::AllreduceOptions& o) override {
    auto c = all_on_cpu(t);
    if (o.reduceOp != c10d::ReduceOp::AVG) return inner->allreduce(c, o);
    auto sum = o;  // the CPU's backend has no means of integers
    sum.reduceOp = c10d::ReduceOp::SUM;
    auto work = inner->allreduce(c, sum);
    work->wait();
    for (auto& tensor : c) tensor.is_floating_point() ? tensor.div_(getSize()) : tensor.div_(getSize(), "trunc");
    return work;
  }
  Work reduce(Tensors& t, const c10d::ReduceOptions& o) override {
    auto c = all_on_cpu(t);
    return inner->reduce(c, o);
  }
  Work allgather(std::vector<Tensors>& to, Tensors& from, const c10d::AllgatherOptions& o) override {
    auto a = lists_on_cpu(to);
    auto b = all_on_cpu(from);
    return inner->allgather(a, b, o);
  }
  Work _allgather_base(at::Tensor& to, at::Tensor& from, const c10d::AllgatherOptions& o) override {
    auto c = all_on_cpu({to, from});
    return inner->_allgather_base(c[0], c[1], o);
  }
  Work _reduce_scatter_base(at::Tensor& to, at::Tensor& from, const c10d::ReduceScatterOptions& o) override {
    auto c = all_on_cpu({to, from});
    return inner->_reduce_scatter_base(c[0], c[1], o);
  }
  Work allgather_into_tensor_coalesced(Tensors& to, Tensors& from, const c10d::AllgatherOptions& o) override {
    auto a = all_on_cpu(to);
    auto b = all_on_cpu(from);
    return inner->allgather_into_tensor_coalesced(a, b, o);
  }
  Work reduce_scatter_tensor_coalesced(Tensors& to, Tensors& from, const c10d::ReduceScatterOptions& o) override {
    auto a = all_on_cpu(to);
    auto b = all_on_cpu(from);
    return inner->reduce_scatter_tensor_coalesced(a, b, o);
  }
  Work gather(std::vector<Tensors>& to, Tensors& from, const c10d::GatherOptions& o) override {
    auto a = lists_on_cpu(to);
    auto b = all_on_cpu(from);
    return inner->gather(a, b, o);
  }
  Work scatter(Tensors& to, std::vector<Tensors>& from, const c10d::ScatterOptions& o) override {
    auto a = all_on_cpu(to);
    auto b = lists_on_cpu(from);
    return inner->scatter(a, b, o);
  }
  Work alltoall_base(at::Tensor& to, at::Tensor& from, std::vector<int64_t>& a, std::vector<int64_t>& b,
                     const c10d::AllToAllOptions& o) override {
    auto c = all_on_cpu({to, from});
    return inner->alltoall_base(c[0], c[1], a, b, o);
  }
  Work send(Tensors& t, int rank, int tag) override {
    auto c = all_on_cpu(t);
    return inner->send(c, rank, tag);
  }
  Work recv(Tensors& t, int rank, int tag) override {
    auto c = all_on_cpu(t);
    return inner->recv(c, rank, tag);
  }
  Work barrier(const c10d::BarrierOptions& o) override { return inner->barrier(o); }
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(TYPE, &memory);
  pybind11::module_::import("torch._C._distributed_c10d");
  pybind11::class_<Relay, c10d::Backend, c10::intrusive_ptr<Relay>>(module, "Relay")
      .def(pybind11::init<c10::intrusive_ptr<c10d::Backend>, bool>());
  module.def("finish", &finish, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("number_late", [] { return number_late; });
}
