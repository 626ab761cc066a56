// What lets torch's autograd run over fake CUDA tensors in a build without CUDA; see fake_cuda.py.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>
#include <sys/mman.h>

using c10::Device, c10::DeviceType, c10::Stream;

// A build without CUDA has no guard for its devices, and autograd asks one for the current device and stream.
struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

namespace at::accelerator { bool isAccelerator(DeviceType); }

// Autograd would synchronise streams of an accelerator, of which a build without CUDA has none: it is told that nothing
// is one. x86-64: xor eax, eax; ret.
static const int patched = [] {
  auto *code = reinterpret_cast<char *>(&at::accelerator::isAccelerator);
  auto *page = reinterpret_cast<char *>(reinterpret_cast<size_t>(code) & ~size_t(4095));
  mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC);
  std::memcpy(code, "\x31\xc0\xc3", 3);
  return mprotect(page, 8192, PROT_READ | PROT_EXEC);
}();
