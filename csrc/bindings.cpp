// Python's door to the core: pointers and sizes in, nothing else. Whoever calls has checked shapes, dtypes
// and devices (gas_engine/ops); only the count of states, which bounds arrays here, is checked again.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "adjoint.h"
#include "lincomb.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

std::vector<const void*> pointers(const std::vector<Address>& addresses) {
    if (addresses.empty() || addresses.size() > gas::kMaxStates) {
        throw std::invalid_argument("between 1 and 64 states, got " + std::to_string(addresses.size()));
    }
    std::vector<const void*> result;
    for (Address address : addresses) result.push_back(pointer<const void>(address));
    return result;
}

gas::LincombArgs lincomb_args(int dtype, const std::vector<const void*>& states, Address coef, Address out,
                              int scaled_dtype, Address scale, Address scaled, std::int64_t n) {
    return {static_cast<gas::DType>(dtype), states.data(),         static_cast<int>(states.size()),
            pointer<const double>(coef),    pointer<void>(out),    static_cast<gas::DType>(scaled_dtype),
            pointer<const double>(scale),   pointer<void>(scaled), n};
}

gas::AdjointArgs adjoint_args(int dtype, Address x, Address f, const std::vector<const void*>& g, Address a,
                              Address b, Address mu, Address g_x, Address da, Address db, Address workspace,
                              std::int64_t n) {
    return {static_cast<gas::DType>(dtype),
            pointer<const void>(x),
            pointer<const void>(f),
            g.data(),
            static_cast<int>(g.size()),
            pointer<const double>(a),
            pointer<const double>(b),
            pointer<void>(mu),
            pointer<void>(g_x),
            pointer<double>(da),
            pointer<double>(db),
            pointer<double>(workspace),
            n};
}

py::dict build_info() {
    py::dict info;
    info["version"] = GAS_ENGINE_VERSION;
    info["cuda"] = *GAS_ENGINE_CUDA_VERSION != '\0';
    info["cuda_version"] = GAS_ENGINE_CUDA_VERSION;
    info["cuda_archs"] = GAS_ENGINE_CUDA_ARCHS;
    info["compiler"] = GAS_ENGINE_COMPILER;
    info["march"] = GAS_ENGINE_MARCH;
    info["openmp_threads"] = omp_get_max_threads();
    return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The native core of gas_engine. Call gas_engine.ops instead: nothing here checks a pointer.";
    m.def("build_info", &build_info, "What this module was built with.");

    m.def("lincomb_cpu", [](int dtype, const std::vector<Address>& states, Address coef, Address out,
                            int scaled_dtype, Address scale, Address scaled, std::int64_t n, int threads) {
        const auto list = pointers(states);
        py::gil_scoped_release release;
        gas::lincomb_cpu(lincomb_args(dtype, list, coef, out, scaled_dtype, scale, scaled, n), threads);
    });
    m.def("adjoint_workspace", &gas::adjoint_workspace);
    m.def("adjoint_cpu",
          [](int dtype, Address x, Address f, const std::vector<Address>& g, Address a, Address b, Address mu,
             Address g_x, Address da, Address db, Address workspace, std::int64_t n, int threads) {
              const auto list = pointers(g);
              py::gil_scoped_release release;
              gas::adjoint_cpu(adjoint_args(dtype, x, f, list, a, b, mu, g_x, da, db, workspace, n), threads);
          });

#ifdef GAS_ENGINE_WITH_CUDA
    // Each returns the error message of a failed launch, or an empty string.
    m.def("lincomb_cuda",
          [](int dtype, const std::vector<Address>& states, Address coef, Address out, int scaled_dtype,
             Address scale, Address scaled, std::int64_t n, int device, Address stream) {
              const auto list = pointers(states);
              py::gil_scoped_release release;
              const char* error =
                  gas::lincomb_cuda(lincomb_args(dtype, list, coef, out, scaled_dtype, scale, scaled, n),
                                    device, pointer<void>(stream));
              return std::string(error ? error : "");
          });
    m.def("adjoint_cuda", [](int dtype, Address x, Address f, const std::vector<Address>& g, Address a,
                             Address b, Address mu, Address g_x, Address da, Address db, Address workspace,
                             std::int64_t n, int device, Address stream) {
        const auto list = pointers(g);
        py::gil_scoped_release release;
        const char* error =
            gas::adjoint_cuda(adjoint_args(dtype, x, f, list, a, b, mu, g_x, da, db, workspace, n), device,
                              pointer<void>(stream));
        return std::string(error ? error : "");
    });
#endif
}
