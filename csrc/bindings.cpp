// Python's door to the core: tensors and sizes in, nothing else. Whoever calls has checked shapes, dtypes
// and devices (gas_engine/ops); only the count of states, which bounds arrays here, is checked again.
//
// An op is its struct of arguments: Python passes the fields in their order, then the number of threads
// (host) or the device and its stream. A tensor stands for its address or its dtype, as the field asks; None
// for a null pointer.
#ifndef NDEBUG
#define NDEBUG  // or pybind11 asks for the lock at every reference
#endif
#include <omp.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "adjoint.h"
#include "bias_leaky_relu.h"
#include "glu.h"
#include "group_norm_silu.h"
#include "lincomb.h"
#include "resample2d.h"
#include "reversible.h"
#include "tensor.h"

namespace py = pybind11;

namespace {

// One Python value, turned into whatever field it meets.
class From {
  public:
    explicit From(py::handle value) : value_(value) {}

    template <class T>
    operator T() const {
        if constexpr (std::is_pointer_v<T>) {
            return value_.is_none() ? nullptr : static_cast<T>(address());
        } else if constexpr (std::is_same_v<T, gas::DType>) {
            return dtype();
        } else if constexpr (std::is_same_v<T, gas::States>) {
            return states();
        } else if constexpr (std::is_floating_point_v<T>) {
            return value_.cast<T>();
        } else {
            return static_cast<T>(integer());
        }
    }

  private:
    long long integer() const {
        const long long number = PyLong_AsLongLong(value_.ptr());  // addresses stay below 2^63
        if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
        return number;
    }

    gas::TensorView view() const {
        gas::TensorView view;
        if (!gas::Tensors::is_tensor(value_.ptr()) || !gas::Tensors::view(value_.ptr(), view))
            throw py::type_error("a tensor with memory of its own wanted");
        return view;
    }

    void* address() const {
        return PyLong_Check(value_.ptr()) ? reinterpret_cast<void*>(integer()) : view().address();
    }

    gas::DType dtype() const {
        gas::DType dtype{};
        if (!value_.is_none() && !view().stores(dtype)) throw py::type_error("a floating tensor wanted");
        return dtype;
    }

    gas::States states() const {
        const auto tensors = py::reinterpret_borrow<py::sequence>(value_);
        gas::States states{};
        const std::size_t count = tensors.size();
        if (count < 1 || count > gas::kMaxStates)
            throw std::invalid_argument("between 1 and 64 states, got " + std::to_string(count));
        states.count = static_cast<int>(count);
        for (std::size_t i = 0; i < count; ++i) {
            const From state(PySequence_Fast_GET_ITEM(value_.ptr(), i));
            states.at[i] = state.address();
            states.dtype[i] = state.dtype();
        }
        return states;
    }

    py::handle value_;
};

struct Anything {
    template <class T>
    operator T() const;
};

// How many fields a struct has: the most initialisers it takes.
template <class Args, class... Fields>
constexpr std::size_t fields() {
    if constexpr (requires { Args{Fields{}..., Anything{}}; })
        return fields<Args, Fields..., Anything>();
    else
        return sizeof...(Fields);
}

template <class Args>
Args unpack(const py::args& values, std::size_t extra) {
    constexpr std::size_t count = fields<Args>();
    if (values.size() != count + extra)
        throw std::invalid_argument(std::to_string(count + extra) + " arguments wanted, got " +
                                    std::to_string(values.size()));
    return [&]<std::size_t... I>(std::index_sequence<I...>) {
        return Args{From(PyTuple_GET_ITEM(values.ptr(), I))...};
    }(std::make_index_sequence<count>{});
}

template <class Args>
void op(py::module_& m, const std::string& name, void (*cpu)(const Args&, int),
        [[maybe_unused]] const char* (*cuda)(const Args&, int, void*)) {
    m.def((name + "_cpu").c_str(), [cpu](const py::args& values) {
        const auto args = unpack<Args>(values, 1);
        const int threads = From(PyTuple_GET_ITEM(values.ptr(), values.size() - 1));
        py::gil_scoped_release release;
        cpu(args, threads);
    });
#ifdef GAS_ENGINE_WITH_CUDA
    // Returns the error message of a failed launch, or None.
    m.def((name + "_cuda").c_str(), [cuda](const py::args& values) {
        const auto args = unpack<Args>(values, 2);
        const int device = From(values[values.size() - 2]);
        void* const stream = From(values[values.size() - 1]);
        py::gil_scoped_release release;
        return cuda(args, device, stream);
    });
#endif
}

// None unless every tensor among the values is plain; else whether one of them requires a gradient.
py::object plain(const py::args& values) {
    bool wanted = false;
    for (const py::handle value : values) {
        gas::TensorView view;
        if (gas::Tensors::is_tensor(value.ptr()) && !gas::Tensors::plain(value.ptr(), view, wanted))
            return py::none();
    }
    return py::bool_(wanted);
}

// The same for lists of 1 to 64 states, which must be contiguous and, with `more`, of one shape, dtype and
// device; of the others plain is enough.
py::object uniform(py::handle states, const py::tuple& more, const py::tuple& others) {
    if (!PyList_CheckExact(states.ptr()) && !PyTuple_CheckExact(states.ptr())) return py::none();
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(states.ptr());
    if (count < 1 || count > gas::kMaxStates) return py::none();
    bool wanted = false;
    gas::TensorView first{}, view;
    gas::DType dtype;
    const auto fits = [&](PyObject* value) {
        if (!gas::Tensors::plain(value, view, wanted) || !view.contiguous() || !view.stores(dtype))
            return false;
        if (first.shape == nullptr) first = view;
        return view.like(first);
    };
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (!fits(PySequence_Fast_GET_ITEM(states.ptr(), i))) return py::none();
    }
    for (const py::handle value : more) {
        if (!fits(value.ptr())) return py::none();
    }
    for (const py::handle value : others) {
        if (!gas::Tensors::plain(value.ptr(), view, wanted)) return py::none();
    }
    return py::bool_(wanted);
}

#ifdef GAS_ENGINE_WITH_CUDA
#define DEVICE(function) gas::function
#else
#define DEVICE(function) nullptr
#endif

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
    m.def("bind", &gas::Tensors::bind, "Takes torch's Tensor and Parameter.");
    m.def("plain", &plain);
    m.def("uniform", &uniform);
    m.def("build_info", &build_info, "What this module was built with.");

    op<gas::LincombArgs>(m, "lincomb", gas::lincomb_cpu, DEVICE(lincomb_cuda));
    op<gas::AdjointArgs>(m, "adjoint", gas::adjoint_cpu, DEVICE(adjoint_cuda));
    op<gas::GluArgs>(m, "glu", gas::glu_cpu, DEVICE(glu_cuda));
    op<gas::ReversibleArgs>(m, "reversible", gas::reversible_cpu, DEVICE(reversible_cuda));
    op<gas::GroupNormArgs>(m, "group_norm_silu", gas::group_norm_silu_cpu, DEVICE(group_norm_silu_cuda));
    op<gas::GroupNormArgs>(m, "group_norm_silu_backward", gas::group_norm_silu_backward_cpu,
                           DEVICE(group_norm_silu_backward_cuda));
    op<gas::BiasLeakyReluArgs>(m, "bias_leaky_relu", gas::bias_leaky_relu_cpu, DEVICE(bias_leaky_relu_cuda));
    op<gas::Resample2dArgs>(m, "resample2d", gas::resample2d_cpu, DEVICE(resample2d_cuda));
    m.attr("REDUCTION_BLOCKS") = gas::kReductionBlocks;
    m.attr("BIAS_SPLITS") = gas::kBiasSplits;
}
