#include "kernels/cuda/linear.h"

#include <algorithm>
#include <bit>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "kernels/cuda/linear_paths.h"

namespace pyra::kernels::cuda {
namespace {

// NVIDIA's advice for Hopper; older GPUs need less.
constexpr size_t kWorkspace = 32 << 20;
constexpr int kCandidates = 12;
constexpr int kTrials = 5, kShortTrials = 21;  // of products that take less than kShort
constexpr float kShort = 0.05f;                // ms

void check_blas(cublasStatus_t status, const char* call, const LinearCall* shape = nullptr) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  if (!shape) fail(ExitCode::device, "cuBLASLt: ", cublasLtGetStatusString(status), " at ", call);
  fail(ExitCode::device, "cuBLASLt: ", cublasLtGetStatusString(status), " at ", call, " for [", shape->rows, ",",
       shape->in, "] x [", shape->out, ",", shape->in, "]ᵀ");
}
#define PYRA_BLAS(call) check_blas((call), #call)

cudaDataType_t data_type(DType dtype) {
  return dtype == DType::fp32 ? CUDA_R_32F : dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_16F;
}

struct Strides {
  explicit Strides(const LinearCall& call)
      : x(call.x_stride ? call.x_stride : call.in),
        weight(call.weight_stride ? call.weight_stride
               : call.transposed  ? call.out
                                  : call.in),
        y(call.y_stride ? call.y_stride : call.out) {}
  int x, weight, y;
};

/// Times a product as a pass meets it: the weights in memory, as the layers before have used L2 up, and x in L2, just
/// written. Where memory is too short for that, with both in L2.
class Trials {
 public:
  Trials() {
    int device = 0, bytes = 0;
    PYRA_CUDA(cudaGetDevice(&device));
    PYRA_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
    cache_bytes_ = size_t(bytes);
    for (cudaEvent_t* event : {&begin_, &end_}) PYRA_CUDA(cudaEventCreate(event));
    if (cudaMalloc(&scratch_, 2 * cache_bytes_) == cudaSuccess) return;
    (void)cudaGetLastError();
    scratch_ = nullptr;
  }
  ~Trials() {
    for (cudaEvent_t event : {begin_, end_})
      if (event) (void)cudaEventDestroy(event);
    (void)cudaFree(scratch_);
  }
  Trials(const Trials&) = delete;
  Trials& operator=(const Trials&) = delete;

  /// In ms. A single short time says little: it varies by more than candidates differ.
  template <class Launch>
  [[nodiscard]] float median(const Launch& launch, const LinearCall& call, cudaStream_t stream) const {
    std::vector<float> times{once(launch, call, stream)};
    const size_t trials = times[0] < kShort ? kShortTrials : kTrials;
    while (times.size() < trials) times.push_back(once(launch, call, stream));
    std::ranges::nth_element(times, times.begin() + ptrdiff_t(trials / 2));
    return times[trials / 2];
  }

 private:
  template <class Launch>
  [[nodiscard]] float once(const Launch& launch, const LinearCall& call, cudaStream_t stream) const {
    if (scratch_) {
      const size_t x = (size_t(call.rows - 1) * size_t(Strides(call).x) + size_t(call.in)) * size_of(call.compute);
      PYRA_CUDA(cudaMemsetAsync(scratch_, 0, 2 * cache_bytes_, stream));
      PYRA_CUDA(cudaMemcpyAsync(scratch_, call.x, std::min(x, cache_bytes_ / 2), cudaMemcpyDeviceToDevice, stream));
    }
    PYRA_CUDA(cudaEventRecord(begin_, stream));
    launch();
    PYRA_CUDA(cudaEventRecord(end_, stream));
    PYRA_CUDA(cudaEventSynchronize(end_));
    float ms = 0;
    PYRA_CUDA(cudaEventElapsedTime(&ms, begin_, end_));
    return ms;
  }

  void* scratch_ = nullptr;
  size_t cache_bytes_ = 0;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

std::array<int64_t, 12> shape_of(const LinearCall& call) {
  const Strides strides(call);
  return {call.rows,          call.in,
          call.out,           int(call.compute),
          int(call.result),   int(call.math),
          int(call.epilogue), (call.bias ? 1 : 0) + (call.residual ? 2 : 0) + (call.transposed ? 4 : 0),
          strides.x,          strides.weight,
          strides.y,          0};
}

template <class T>
void set(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check_blas(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof value), "MatmulDescSetAttribute");
}

cublasLtEpilogue_t epilogue_of(const LinearCall& call) {
  switch (call.epilogue) {
    case Epilogue::gelu_tanh:
      return call.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    case Epilogue::gelu_tanh_keep:
      return call.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    case Epilogue::gelu_tanh_back:
      return CUBLASLT_EPILOGUE_DGELU;
    case Epilogue::none:
      break;
  }
  return call.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}

/// Sums that are added up by whoever comes first would differ from run to run.
bool reproducible(const cublasLtMatmulAlgo_t& algorithm) {
  uint32_t scheme = 0;
  size_t written = 0;
  const auto status = cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme,
                                                           sizeof scheme, &written);
  return status == CUBLAS_STATUS_SUCCESS && scheme != CUBLASLT_REDUCTION_SCHEME_INPLACE;
}

}  // namespace

/// What cuBLASLt wants to know of one shape. Row-major [rows,n] is column-major [n,rows], so it computes yᵀ = W xᵀ.
struct LinearRunner::Plan {
  explicit Plan(const LinearCall& call) {
    const auto compute = data_type(call.compute), result = data_type(call.result);
    PYRA_BLAS(cublasLtMatmulDescCreate(
        &description, call.math == MatrixMath::tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(description, CUBLASLT_MATMUL_DESC_TRANSA, call.transposed ? CUBLAS_OP_N : CUBLAS_OP_T);
    set(description, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(call));
    if (call.bias) {
      set(description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, result);
      set(description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, call.bias);  // replaced at every launch
    }
    const Strides strides(call);
    if (call.activation) {
      set(description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, call.activation);  // likewise
      set(description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(strides.y));
      set(description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, compute);
    }
    const auto in = uint64_t(call.in), out = uint64_t(call.out), rows = uint64_t(call.rows);
    PYRA_BLAS(cublasLtMatrixLayoutCreate(&weight, compute, call.transposed ? out : in, call.transposed ? in : out,
                                         strides.weight));
    PYRA_BLAS(cublasLtMatrixLayoutCreate(&x, compute, in, rows, strides.x));
    PYRA_BLAS(cublasLtMatrixLayoutCreate(&y, result, out, rows, strides.y));
  }
  ~Plan() {
    for (cublasLtMatrixLayout_t layout : {weight, x, y})
      if (layout) cublasLtMatrixLayoutDestroy(layout);
    if (description) cublasLtMatmulDescDestroy(description);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  cublasLtMatmulDesc_t description = nullptr;
  cublasLtMatrixLayout_t weight = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
};

LinearRunner::LinearRunner(std::shared_ptr<GemmCache> cache) : cache_(std::move(cache)) {
  PYRA_BLAS(cublasLtCreate(&handle_));
  PYRA_CUDA(cudaMalloc(&workspace_, kWorkspace));
}

LinearRunner::~LinearRunner() {
  plans_.clear();
  if (workspace_) (void)cudaFree(workspace_);
  if (handle_) (void)cublasLtDestroy(handle_);
}

cublasStatus_t LinearRunner::launch(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const LinearCall& call,
                                    cudaStream_t stream) const {
  const float one = 1, beta = call.residual ? 1 : 0;
  if (call.bias) set(plan.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, call.bias);
  if (call.activation) set(plan.description, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, call.activation);
  return cublasLtMatmul(handle_, plan.description, &one, call.weight, plan.weight, call.x, plan.x, &beta,
                        call.residual ? call.residual : call.y, plan.y, call.y, plan.y, &algorithm, workspace_,
                        kWorkspace, stream);
}

void LinearRunner::choose(Plan& plan, const LinearCall& call, const std::string& key, cudaStream_t stream) {
  cublasLtMatmulPreference_t preference = nullptr;
  PYRA_BLAS(cublasLtMatmulPreferenceCreate(&preference));
  const size_t workspace = kWorkspace;
  PYRA_BLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                 sizeof workspace));
  std::vector<cublasLtMatmulHeuristicResult_t> found(kCandidates);
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(handle_, plan.description, plan.weight, plan.x, plan.y, plan.y,
                                                     preference, kCandidates, found.data(), &count);
  (void)cublasLtMatmulPreferenceDestroy(preference);
  check_blas(status, "cublasLtMatmulAlgoGetHeuristic", &call);

  // All once before any is timed: cuBLASLt loads its kernels, which takes memory that the trials would take.
  std::vector<cublasLtMatmulAlgo_t> able;
  for (const auto& candidate : std::span(found).first(size_t(count))) {
    if (candidate.state != CUBLAS_STATUS_SUCCESS || !reproducible(candidate.algo)) continue;
    if (launch(plan, candidate.algo, call, stream) != CUBLAS_STATUS_SUCCESS) continue;
    able.push_back(candidate.algo);
    if (!cache_) break;
  }
  if (able.empty()) check_blas(CUBLAS_STATUS_NOT_SUPPORTED, "choosing an algorithm", &call);
  plan.algorithm = able[0];
  if (!cache_) return;
  const Trials trials;
  std::optional<float> best;
  for (const cublasLtMatmulAlgo_t& algorithm : able) {
    const float took = trials.median([&] { (void)launch(plan, algorithm, call, stream); }, call, stream);
    if (!best || took < *best) best = took, plan.algorithm = algorithm;
  }
  cache_->add(key, std::bit_cast<AlgorithmWords>(plan.algorithm));
}

LinearRunner::Plan& LinearRunner::plan_of(const LinearCall& call, cudaStream_t stream) {
  const auto shape = shape_of(call);
  std::unique_ptr<Plan>& plan = plans_[shape];
  if (plan) return *plan;
  auto fresh = std::make_unique<Plan>(call);
  const std::string key = join(std::span<const int64_t>(shape));
  const auto known = cache_ ? cache_->find(key) : std::nullopt;
  if (known) fresh->algorithm = std::bit_cast<cublasLtMatmulAlgo_t>(*known);
  cublasLtMatmulHeuristicResult_t result{};
  // A file may say anything: cuBLASLt looks at the words before they run.
  const bool usable = known &&
                      cublasLtMatmulAlgoCheck(handle_, fresh->description, fresh->weight, fresh->x, fresh->y, fresh->y,
                                              &fresh->algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
                      result.workspaceSize <= kWorkspace;
  if (!usable) choose(*fresh, call, key, stream);
  plan = std::move(fresh);
  return *plan;
}

bool awaits_tally(const LinearCall& call) {
  return small_linear_cut(call).rows > 0;
}

void LinearRunner::run(const LinearCall& call, cudaStream_t stream) {
  if (call.rows < 1 || call.in < 1 || call.out < 1)
    fail(ExitCode::internal, "linear: [", call.rows, ",", call.in, "] x [", call.out, ",", call.in, "]ᵀ");
  if (const SmallLinearCut cut = small_linear_cut(call); cut.rows > 0 && linear_sm90(call, cut, stream)) return;
  const Plan& plan = plan_of(call, stream);
  check_blas(launch(plan, plan.algorithm, call, stream), "cublasLtMatmul", &call);
}

}  // namespace pyra::kernels::cuda
